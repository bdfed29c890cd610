"""Claims: what a paper says must be seen, measured again at small scale, with its interval.

A claim is one file of the repository's `claims/` folder, named after its paper
(`claims/lora_undo_safety.py` is the claim `lora-undo-safety`). It states, as literals that are read
without running it,

    TITLE      what is claimed, in one sentence
    METHOD     the method that it is about, "verb/name"
    MODEL      what it is measured on
    EFFECT     what `effect` measures; more is more of what is claimed
    MARGIN     the least effect that the claim asks for; 0 asks for the direction alone
    MINUTES    what it takes on two cores
    NEEDS_GPU  whether it can be run without one

and has a function `run() -> Outcome`, which calls methods inside `with step(seed):`. The claim is
seen when the mean effect is at least the margin, its interval lies above 0 and whatever else must
hold does. What comes out is reported either way; results that were measured are kept in
`claims/results/`, written by

    python -m truing.claims SLUG ...
"""

from __future__ import annotations

import ast
import datetime
import importlib.util
import json
import math
import os
import sys
import tempfile
import time
import types
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from truing import catalogue as registry
from truing.context import Context, Json, current, use
from truing.core.files import expanded
from truing.errors import InputError, unknown
from truing.runs import hardware, versions

SCHEMA_VERSION = 1
LITERALS: dict[str, type | tuple[type, ...]] = {
    "TITLE": str,
    "METHOD": str,
    "MODEL": str,
    "EFFECT": str,
    "MARGIN": (int, float),
    "MINUTES": (int, float),
    "NEEDS_GPU": bool,
}
Over = Literal["seeds", "prompts"]


@dataclass(frozen=True)
class Outcome:
    """What a claim measured.

    Args:
        effects: the effect, once for each seed or prompt.
        over: what there is one effect for; it decides the interval (Student's over seeds,
            bootstrap over prompts).
        seeds: of all random numbers.
        holds: further conditions and whether each was met.
        figures: everything else worth keeping, as JSON has it.
    """

    effects: Sequence[float]
    over: Over = "seeds"
    seeds: Sequence[int] = ()
    holds: Mapping[str, bool] = field(default_factory=dict)
    figures: Mapping[str, object] = field(default_factory=dict)

    @property
    def effect(self) -> float:
        """Mean effect."""
        return math.fsum(self.effects) / len(self.effects)

    @property
    def interval(self) -> tuple[float, float]:
        """Its 95 % interval."""
        from truing.core.stats import bootstrap, mean_interval

        return (mean_interval if self.over == "seeds" else bootstrap)(self.effects)

    def seen(self, margin: float) -> bool:
        """Whether this is what was claimed; one effect alone, without an interval, is not."""
        clear = len(self.effects) > 1 and self.interval[0] > 0
        return self.effect >= margin and clear and all(self.holds.values())


def folder() -> Path:
    """The folder of claims: that of the checkout, or the one that TRUING_CLAIMS names.

    Raises:
        InputError: there is none.
    """
    named = os.environ.get("TRUING_CLAIMS", "")
    found = expanded(named) if named else Path(__file__).resolve().parents[2] / "claims"
    if not found.is_dir():
        raise InputError(
            "there is no folder of claims",
            where=f"TRUING_CLAIMS={named}" if named else "claims",
            seen=str(found),
            fix="Claims lie in the repository: work in a checkout, or set TRUING_CLAIMS to its "
            "folder 'claims'",
        )
    return found


def slug_of(path: Path) -> str:
    """The claim's name: its file's, with hyphens."""
    return path.stem.replace("_", "-")


def files() -> dict[str, Path]:
    """Files of claims by slug; names that begin with an underscore are helpers."""
    paths = sorted(p for p in folder().glob("*.py") if not p.name.startswith("_"))
    return {slug_of(p): p for p in paths}


def literals(path: Path) -> dict[str, object]:
    """What a claim states of itself, read with `ast`.

    Raises:
        InputError: something is missing or not a literal of the right type.
    """
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    except SyntaxError as error:
        raise InputError(f"not valid Python: {error.msg}", where=f"{path}:{error.lineno}") from None
    found: dict[str, object] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if name in LITERALS:
                try:
                    found[name] = ast.literal_eval(node.value)
                except ValueError:
                    raise InputError(
                        f"{name} must be a literal",
                        where=f"{path}:{node.lineno}",
                        fix="Write the value itself, without names or calls",
                    ) from None
    for name, kind in LITERALS.items():
        if not isinstance(found.get(name), kind):
            wanted = kind.__name__ if isinstance(kind, type) else "number"
            raise InputError(
                f"a claim needs {name}, a {wanted}", where=str(path), seen=found.get(name)
            )
    return found


def catalogue() -> list[dict[str, object]]:
    """All claims: claim, title, method, needs_gpu, minutes; nothing is imported."""
    listed: list[dict[str, object]] = []
    for slug, path in files().items():
        stated = literals(path)
        listed.append(
            {
                "claim": slug,
                "title": stated["TITLE"],
                "method": stated["METHOD"],
                "needs_gpu": stated["NEEDS_GPU"],
                "minutes": stated["MINUTES"],
            }
        )
    return listed


@contextmanager
def _beside(path: Path) -> Generator[None]:
    """Let a claim import the helpers that lie beside it."""
    sys.path.insert(0, str(path.parent))
    try:
        yield
    finally:
        sys.path.remove(str(path.parent))


@contextmanager
def step(seed: int) -> Generator[Context]:
    """A step of a claim, with its own seed; what it makes lives until the claim ends."""
    folder = Path(tempfile.mkdtemp(prefix="step-", dir=current().folder))
    with use(Context(seed=seed, folder=folder)) as context:
        yield context


def call(name: str, *inputs: object, seed: int = 0, **settings: Any) -> Any:
    """A method's result, in a step of its own with this seed."""
    from truing.method import methods

    with step(seed):
        return methods[name](*inputs, seed=seed, **settings)


def _load(path: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(f"truing_claim_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise InputError("not a Python file", where=str(path))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _used() -> float:
    """Seconds of processors that this process and its ended children have taken so far."""
    return sum(os.times()[:4])


def measure(slug: str) -> dict[str, Json]:
    """Run a claim; everything that its result file holds.

    Raises:
        InputError: no such claim, its method or a data set is missing, or it needs a GPU.
    """
    known = files()
    name = slug.replace("_", "-")
    if name not in known:
        raise unknown("claim", slug, known)
    path = known[name]
    stated = literals(path)
    registry.find(str(stated["METHOD"]), where=str(path))
    if stated["NEEDS_GPU"]:
        import torch

        if not torch.cuda.is_available():
            raise InputError(
                "this claim needs a GPU and there is none",
                where=f"claim {name}",
                fix="Run it on a machine with one; `truing doctor` says what is found",
            )
    began, used = time.monotonic(), _used()
    with use(Context(name=name)), _beside(path):
        outcome = cast("Callable[[], Outcome]", _load(path).run)()
    seconds, cpu_seconds = time.monotonic() - began, _used() - used
    if not outcome.effects or not all(map(math.isfinite, outcome.effects)):
        raise InputError(
            "a claim must measure finite effects",
            where=str(path),
            seen=list(outcome.effects),
            fix="Give `effects` of its Outcome one finite number for each of `over`",
        )
    lo, hi = outcome.interval
    margin = float(cast(float, stated["MARGIN"]))
    return {
        "schema_version": SCHEMA_VERSION,
        "claim": name,
        "title": cast(str, stated["TITLE"]),
        "method": cast(str, stated["METHOD"]),
        "measures": cast(str, stated["EFFECT"]),
        "margin": margin,
        "seen": outcome.seen(margin),
        "effect": outcome.effect,
        "interval": [lo, hi],
        "effects": list(outcome.effects),
        "over": outcome.over,
        "seeds": list(outcome.seeds),
        "holds": dict(outcome.holds),
        "figures": cast("dict[str, Json]", dict(outcome.figures)),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "hardware": hardware(),
        "versions": versions(),
    }


def cost(result: Mapping[str, Json]) -> float:
    """Seconds that a measurement takes where nothing else runs.

    On a busy machine the clock counts what others do, with several threads the processors' time
    counts each: the lesser of both is told. Older results have the clock's alone.
    """
    kept = (result.get(name) for name in ("seconds", "cpu_seconds"))
    return min((cast(float, s) for s in kept if s is not None), default=0.0)


def missed(result: Mapping[str, Json]) -> list[str]:
    """The conditions that a result does not meet, in words; none when the claim was seen."""
    effect, margin = (cast(float, result.get(n) or 0.0) for n in ("effect", "margin"))
    low = cast("list[float]", result.get("interval") or [math.inf])[0]
    failed = [f"effect at least {margin:g}"] if effect < margin else []
    failed += ["interval above 0"] if low <= 0 else []
    holds = cast("dict[str, bool]", result.get("holds") or {})
    return failed + [name for name, held in holds.items() if not held]


def line(result: Mapping[str, Json]) -> dict[str, Json]:
    """Of a result what is told in one line: {"claim", "seen", "effect", "interval", "seconds"}."""
    return {name: result[name] for name in ("claim", "seen", "effect", "interval", "seconds")}


def claim(slug: str) -> dict[str, Json]:
    """Measure a claim again: {"claim", "seen", "effect", "interval", "seconds"}.

    The interval is the 95 % one. What one that is not seen does not meet, `truing claim` says.

    Args:
        slug: the claim's name, as `truing claim --list` has it.
    Raises:
        InputError: no such claim, its method or a data set is missing, or it needs a GPU.
    """
    return line(measure(slug))


def record(slug: str) -> dict[str, Json]:
    """Measure a claim and keep the result in `claims/results/`."""
    from truing.core.files import write_text

    found = measure(slug)
    path = folder() / "results" / f"{found['claim']}.json"
    path.parent.mkdir(exist_ok=True)
    write_text(path, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    return found


def results() -> dict[str, dict[str, Json]]:
    """The results that are kept, by slug."""
    kept: dict[str, dict[str, Json]] = {}
    for path in sorted((folder() / "results").glob("*.json")):
        again = f"Measure it again: python -m truing.claims {path.stem}"
        try:
            data = cast("dict[str, Json]", json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise InputError(f"not valid JSON: {error}", where=str(path), fix=again) from None
        if data.get("schema_version") != SCHEMA_VERSION:
            raise InputError(
                f"result of another schema than {SCHEMA_VERSION}",
                where=str(path),
                seen=data.get("schema_version"),
                fix=again,
            )
        kept[path.stem] = data
    return kept


def main(slugs: Sequence[str]) -> int:
    """Measure and keep these claims; exit code 2 for the user's mistakes."""
    try:
        for slug in slugs or list(files()):
            found = record(slug)
            print(json.dumps(line(found) | {"missed": cast(Json, missed(found))}))
    except InputError as error:
        print(f"truing: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

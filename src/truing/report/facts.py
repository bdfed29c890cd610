"""A run as its folder tells it: the manifest and the metrics, read into plain records.

A report is also wanted of runs that failed, that still run, or that an older version wrote, so
whatever a manifest leaves out has an empty value; only another schema is refused.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from truing.errors import InputError
from truing.report.wording import count, excerpt, shown

SCHEMA_VERSION = 1
APART = ("at", "step", "seconds", "receipt")  # of what a step observes: where and when that was
MOST_VALUES = 6  # of one observation that are listed
Facts = Mapping[str, object]


@dataclass(frozen=True)
class StepFacts:
    """One step of a run.

    Args:
        inputs: parameter -> names of the steps, models or data sets that it came from.
        key: of the step; `artefact` is the content key of what it made.
        about: what it made in a few words, such as "64 pair rows".
        seconds: that it took, in an earlier run where it was reused; `cost` is what endpoints
            took for it, where their price was said.
        note: what to know of a reused result, such as other library versions.
    """

    name: str
    method: str = ""
    summary: str = ""
    settings: Facts = field(default_factory=dict[str, object])
    inputs: Mapping[str, Sequence[str]] = field(default_factory=dict[str, list[str]])
    key: str = ""
    artefact: str = ""
    noun: str = ""
    about: str = ""
    status: str = "pending"
    cached: bool = False
    seconds: float = 0.0
    cost: float = 0.0
    error: str = ""
    note: str = ""
    seed: str = ""

    def sources(self) -> list[str]:
        """Everything that flows in, without repeats."""
        return list(dict.fromkeys(s for names in self.inputs.values() for s in names))


@dataclass(frozen=True)
class RunFacts:
    """A whole run; `steps` in topological order.

    Args:
        command: that goes on with it, or makes it again.
        left_out: rows of data sets that cannot be used, in words.
    """

    name: str
    status: str
    steps: Mapping[str, StepFacts]
    command: str = ""
    plan_key: str = ""
    seed: str = ""
    started: str = ""
    seconds: float = 0.0
    versions: Facts = field(default_factory=dict[str, object])
    hardware: Facts = field(default_factory=dict[str, object])
    models: Mapping[str, Facts] = field(default_factory=dict[str, Facts])
    result: Facts = field(default_factory=dict[str, object])
    left_out: Sequence[str] = ()

    def edges(self) -> list[tuple[str, str]]:
        """(step, step that needs it), in the order of the manifest."""
        return [
            (source, step.name)
            for step in self.steps.values()
            for source in step.sources()
            if source in self.steps
        ]

    @property
    def began(self) -> str:
        """When it started, to the minute."""
        zone = " UTC" if self.started.endswith(("+00:00", "Z")) else ""
        return self.started[:16].replace("T", " ") + zone

    def spent(self) -> float:
        """Seconds of the steps that this run did itself."""
        return sum(s.seconds for s in self.steps.values() if not s.cached)

    def done(self) -> int:
        """Number of steps that have ended well."""
        return sum(s.status == "done" for s in self.steps.values())

    def named(self) -> dict[str, str]:
        """Keys of models and of the steps' artefacts -> how a reader knows them."""
        names: dict[str, str] = {}
        for step in self.steps.values():
            names |= {k: step.name for k in (step.key, step.artefact) if k}
        names |= {text(m, "key"): name for name, m in self.models.items() if text(m, "key")}
        return names


def text(facts: Facts, name: str) -> str:
    """A field as text, "" when absent."""
    found = facts.get(name)
    return "" if found is None else str(found)


def number(facts: Facts, name: str) -> float:
    """A field as a number, 0 when it is none."""
    found = facts.get(name)
    return float(found) if isinstance(found, (int, float)) else 0.0


def mapping(facts: Facts, name: str) -> Facts:
    """A field as a mapping, empty when it is none."""
    found = facts.get(name)
    return cast("Facts", found) if isinstance(found, Mapping) else {}


def _names(value: object) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        value = list(cast("Mapping[str, object]", value).values())
    if isinstance(value, Sequence):
        return [str(v) for v in cast("Sequence[object]", value)]
    return []


def _step(name: str, facts: Facts) -> StepFacts:
    return StepFacts(
        name=name,
        method=text(facts, "method"),
        summary=text(facts, "summary"),
        settings=mapping(facts, "settings"),
        inputs={k: _names(v) for k, v in mapping(facts, "inputs").items()},
        key=text(facts, "key"),
        artefact=text(facts, "artefact"),
        noun=text(facts, "noun"),
        about=text(facts, "about"),
        status=text(facts, "status") or "pending",
        cached=bool(facts.get("cached")),
        seconds=number(facts, "seconds"),
        cost=number(facts, "cost"),
        error=text(facts, "error"),
        note=text(facts, "note"),
        seed=text(facts, "seed"),
    )


def read_run(manifest: Facts) -> RunFacts:
    """The run that a manifest describes; an InputError when it is of another schema."""
    if manifest.get("schema_version", SCHEMA_VERSION) != SCHEMA_VERSION:
        raise InputError(
            "manifest of another schema",
            where="manifest",
            seen=manifest.get("schema_version"),
            fix=f"This version reads {SCHEMA_VERSION}",
        )
    steps = mapping(manifest, "steps")
    models = mapping(manifest, "models")
    recipe, left = text(manifest, "recipe"), manifest.get("left_out")
    return RunFacts(
        name=text(manifest, "name") or "run",
        status=text(manifest, "status") or "running",
        steps={name: _step(name, mapping(steps, name)) for name in steps},
        command=text(manifest, "command")
        or (shlex.join(["truing", "run", recipe]) if recipe else ""),
        plan_key=text(manifest, "plan_key"),
        seed=text(manifest, "seed"),
        started=text(manifest, "started"),
        seconds=number(manifest, "seconds"),
        versions=mapping(manifest, "versions"),
        hardware=mapping(manifest, "hardware"),
        models={name: mapping(models, name) for name in models},
        result=mapping(manifest, "result"),
        left_out=[
            f"{count(int(number(one, 'left_out')), 'row')} of {text(one, 'data')}"
            for one in (cast("Sequence[Facts]", left) if isinstance(left, list) else ())
            if "left_out" in one
        ],
    )


def read_manifest(path: Path) -> dict[str, object]:
    """manifest.json of a run's folder."""
    try:
        data: object = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        fix = "Give the folder of a run, which `truing run` writes below --runs"
        raise InputError(f"no readable manifest: {error}", where=str(path), fix=fix) from None
    if not isinstance(data, dict):
        fix = "Run the recipe again, which writes it anew"
        raise InputError("a manifest is one JSON object", where=str(path), seen=data, fix=fix)
    return cast("dict[str, object]", data)


def read_metrics(path: Path) -> list[dict[str, object]]:
    """Lines of metrics.jsonl; none when absent. A last line torn by a kill is left out."""
    if not path.is_file():
        return []
    rows: list[dict[str, object]] = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            row: object = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(cast("dict[str, object]", row))
    return rows


def of_step(metrics: Iterable[Facts]) -> dict[str, list[Facts]]:
    """Metrics by the step that observed them, in order."""
    found: dict[str, list[Facts]] = {}
    for row in metrics:
        found.setdefault(text(row, "at"), []).append(row)
    return found


def noted(rows: Iterable[Facts]) -> list[tuple[str, str]]:
    """What a step observed outside of its updates: each value that it told of."""
    found: dict[str, list[object]] = {}
    for row in rows:
        for name in (n for n in row if "step" not in row and n not in APART):
            found.setdefault(name, []).append(row[name])
    return [(name, _told(values)) for name, values in found.items()]


def _told(values: Sequence[object]) -> str:
    texts = [shown(v) or "none" for v in values]
    numbers = [float(v) for v in values if isinstance(v, (int, float))]
    if len(set(texts)) == 1:
        return texts[0]
    if len(texts) > MOST_VALUES and len(numbers) == len(texts):
        return f"{shown(min(numbers))} to {shown(max(numbers))}, {len(texts)} times"
    return excerpt(", ".join(texts if len(texts) <= MOST_VALUES else dict.fromkeys(texts)), 400)

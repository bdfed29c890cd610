"""Run folders: manifest, metrics and report of one execution of a plan."""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Generator, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, cast

from truing import __version__, jsontext
from truing.context import Json
from truing.core import files, private
from truing.errors import InputError, Stopped, unknown
from truing.faults import make_folder
from truing.jsontext import plain
from truing.watchers import Watched

if TYPE_CHECKING:
    from truing.keys import Nouns
    from truing.method import Method
    from truing.plan import Checked, Plan
    from truing.store import Noun

SCHEMA_VERSION = 1
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "pyarrow")


def versions(others: Iterable[str] = ()) -> dict[str, Json]:
    """Versions of this package, of Python and of the libraries that results depend on.

    Args:
        others: packages beside; what is not installed is left out.
    """
    found: dict[str, Json] = {"truing": __version__, "python": platform.python_version()}
    named = {p: _version(p) for p in (*PACKAGES, *others) if p not in found}
    return found | {p: version for p, version in named.items() if version}


@functools.cache
def _version(package: str) -> str:
    """Of an installed package; "" for the file or module of a user's own function."""
    try:
        return metadata.version(package)
    except (metadata.PackageNotFoundError, ValueError):
        return ""


def facts_of(
    method: Method, nouns: Nouns, settings: Mapping[str, object], seed: int, seconds: float
) -> dict[str, Json]:
    """What the store is told of a step that has run."""
    from truing.keys import device_class, entries_of

    packages = sorted({e.package for e in entries_of(method, settings, nouns)})
    return {
        "method": method.id,
        "settings": {n: plain(v) for n, v in private.hidden(settings).items()},
        "inputs": {
            name: {r: n.key for r, n in value.items()} if isinstance(value, Mapping) else value.key
            for name, value in nouns.items()
        },
        "seed": seed,
        "seconds": round(seconds, 3),
        "versions": versions(packages),
        "device": device_class(),
        "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def hardware() -> dict[str, Json]:
    """Processor, cores, memory, accelerators."""
    from truing import doctor

    return doctor.hardware()


def _known_hardware() -> dict[str, Json]:
    """The same, as far as it is known without importing PyTorch."""
    from truing import doctor

    return doctor.hardware() if "torch" in sys.modules else doctor.machine()


def started() -> float:
    """When the command began, in seconds since 1970: `make` says so in TRUING_STARTED."""
    try:
        return float(os.environ["TRUING_STARTED"])
    except (KeyError, ValueError):
        return time.time()


def _command(plan: Plan, runs: str | Path) -> str:
    """What goes on with a run, or makes it again, as it is typed; "" of a plan in Python."""
    words = ["truing", *plan.command, *([] if str(runs) == "runs" else ["--runs", str(runs)])]
    return shlex.join(map(private.shown, words)) if plan.command else ""


class Run:
    """The folder of one run; every change of its state is on the disk at once.

    `runs/NAME-HASH`: the same plan has the same folder, so that a stopped run goes on in it. One
    process at a time writes there, inside `alone`.
    """

    def __init__(self, plan: Plan, runs: str | Path, watched: Watched | None = None) -> None:
        self.began, self.plan, self.watched = started(), plan, watched or Watched()
        self.folder = files.expanded(runs) / f"{plan.name}-{plan.key[:8]}"
        make_folder(self.folder, f"--runs {runs}")
        self.manifest: dict[str, Json] = {
            "schema_version": SCHEMA_VERSION,
            "name": plan.name,
            "recipe": plan.source,
            "command": _command(plan, runs),
            "plan_key": plan.key,
            "seed": plan.seed,
            "started": datetime.datetime.fromtimestamp(self.began, datetime.UTC).isoformat(),
            "seconds": 0.0,
            "status": "running",
            "versions": versions(),
            "hardware": _known_hardware(),
            "models": {},
            "steps": {},
            "result": {},
        }

    @contextlib.contextmanager
    def alone(self) -> Generator[None]:
        """Hold the folder for this process, and begin its record anew; watchers are told its end.

        Raises:
            Stopped: another process runs here. Waiting would look like hanging, and what that one
                makes is in the store for the next.
        """
        path = self.folder / ".lock"
        with files.lock(path, wait=False) as free:
            if not free:
                raise Stopped(
                    "another process runs this recipe in the same folder",
                    where=str(self.folder),
                    seen=path.read_text().strip() or None,
                    fix="Once it has ended, the same command takes what it made from the store; "
                    "--runs FOLDER runs beside it",
                )
            path.write_text(f"process {os.getpid()} on {platform.node()}\n")
            (self.folder / "metrics.jsonl").write_text("")
            try:
                yield
            finally:
                self.watched.tell("end", self.manifest, self.folder / "report.html")

    def begin(self) -> None:
        """The steps are entered: the run goes on from here."""
        self.write()
        self.watched.tell("start", self.folder, self.manifest)

    @property
    def steps(self) -> dict[str, dict[str, Json]]:
        """State of each step, in the order of execution."""
        return cast("dict[str, dict[str, Json]]", self.manifest["steps"])

    def open_step(self, one: Checked) -> None:
        """Enter a step as pending."""
        self.steps[one.name] = {
            "method": one.method.id,
            "verb": one.method.verb,
            "summary": one.method.summary,
            "settings": {
                n: plain(v) for n, v in private.hidden({**one.settings, **one.references}).items()
            },
            "seed": one.seed,
            "inputs": {
                name: [private.shown(s.text) for s in sources]
                for name, sources in one.inputs().items()
            },
            "key": "",
            "artefact": "",
            "noun": one.method.returns,
            "about": "",
            "status": "pending",
            "cached": False,
            "seconds": 0.0,
            "error": "",
        }

    def change(self, step: str, **facts: Json) -> None:
        """Record facts of a step."""
        self.steps[step] |= facts
        self.write()

    def end_step(self, step: str, made: Noun | None = None, **facts: Json) -> None:
        """Record how a step ended, and tell the watchers, with what it measured where it did."""
        from truing.reports import Report

        self.change(step, **facts)
        self.watched.tell(
            "step", step, self.steps[step], [*made] if isinstance(made, Report) else []
        )

    def metric(self, step: str, values: dict[str, Json]) -> None:
        """Append one observation, for whoever watches the file, and tell the watchers."""
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(jsontext.dumps({"at": step, **values}) + "\n")
        self.watched.tell("metric", step, values)

    def finish(self, status: str, result: dict[str, Json]) -> None:
        """Record how the run ended and what it measured."""
        self.manifest |= {"status": status, "result": result}
        self.write()

    def write(self) -> None:
        """Put the manifest on the disk."""
        known = cast("dict[str, Json]", self.manifest["hardware"])
        if "gpus" not in known and "torch" in sys.modules:  # since a step needed it
            self.manifest["hardware"] = hardware()
        self.manifest["seconds"] = round(time.time() - self.began, 2)
        text = jsontext.dumps(self.manifest, indent=1, default=str)
        files.write_text(self.folder / "manifest.json", text + "\n")


def _is_manifest(data: object) -> bool:
    """True for what `Run.write` writes, as far as readers rely on it."""
    steps = cast("dict[str, object]", data).get("steps") if isinstance(data, dict) else None
    if not isinstance(steps, dict):
        return False
    for step in cast("dict[str, object]", steps).values():
        facts = cast("dict[str, object]", step) if isinstance(step, dict) else {}
        if not {"method", "key"} <= set(facts) or not isinstance(facts.get("inputs"), dict):
            return False
    return True


def read(folder: str | Path) -> dict[str, Json]:
    """The manifest of a run's folder."""
    path = Path(folder) / "manifest.json"
    try:
        data = cast("dict[str, Json]", json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        fix = "Give one that `truing run` wrote below --runs, such as runs/NAME"
        raise InputError(f"not the folder of a run: {error}", where=str(folder), fix=fix) from None
    if not _is_manifest(data):
        fix = "Run the recipe again, which writes it anew"
        raise InputError("not the manifest of a run", where=str(path), fix=fix)
    if data.get("schema_version") != SCHEMA_VERSION:
        raise InputError(
            f"run of another schema than {SCHEMA_VERSION}",
            where=str(path),
            seen=data.get("schema_version"),
            fix="Run the recipe again with this version, or upgrade truing",
        )
    return data


def key_of_step(text: str) -> str:
    """The key of what a step made, from "FOLDER/STEP"; "" where that is no folder of a run.

    What lies beside it, "FOLDER/STEP/NAME", is "KEY/NAME".
    Raises:
        InputError: the run has no such step, none is named, or it has not finished.
    """
    if (Path(text) / "manifest.json").is_file():
        made = ", ".join(cast("dict[str, Json]", read(text)["steps"]))
        fix = f"Write {Path(text)}/STEP, of its steps: {made}"
        raise InputError("this is a run, of which one step is meant", where=text, fix=fix)
    folder, name = Path(text).parent, Path(text).name
    if "/" not in text or not (folder / "manifest.json").is_file():
        within = "/" in str(folder) and (folder.parent / "manifest.json").is_file()
        return f"{key_of_step(str(folder))}/{name}" if within else ""
    steps = cast("dict[str, dict[str, Json]]", read(folder)["steps"])
    if name not in steps:
        raise unknown("step", name, steps, where=str(folder))
    key = steps[name].get("key")
    if not isinstance(key, str) or not key:
        fix = "Run the recipe again: it goes on where it stopped"
        raise InputError("this step has not finished", where=str(folder), seen=name, fix=fix)
    return key


def latest() -> Path:
    """The folder of the last run in `runs`."""
    found = sorted(Path("runs").glob("*/manifest.json"), key=lambda p: p.stat().st_mtime)
    if not found:
        raise InputError("no run is here", where="runs", fix="Give --run FOLDER")
    return found[-1].parent

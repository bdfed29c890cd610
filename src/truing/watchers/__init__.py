"""Watchers: what is told of a run as it goes, such as a tracker of experiments.

    truing run mine.yaml --watch tensorboard          or TRUING_WATCH=tensorboard,wandb
    watch: [tensorboard]                              a line of a recipe
    truing.run("mine.yaml", watch=["wandb", print])   in Python functions and objects, too

A name is one of truing's own, or an entry point of the group `truing.watchers` of a package: a
subclass of `Watcher`, made anew for each run, or a function that gets (step, values) of each line
of metrics.jsonl. A watcher is told in the first of several processes alone, gets copies, is part of
no step's key, and where it fails, is told nothing more: no result can depend on it.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, cast

from truing.core import private
from truing.errors import InputError, TruingError, unknown
from truing.loading import missing

if TYPE_CHECKING:
    from truing.context import Json
    from truing.reports import Measure

GROUP = "truing.watchers"
VARIABLE = "TRUING_WATCH"
OWN = {
    "tensorboard": "truing.watchers.tensorboard:TensorBoard",
    "wandb": "truing.watchers.wandb:WandB",
}


class Watcher:
    """What is told of a run; of these four a subclass has those that it wants.

    They are called in the run's own thread: what takes long holds it up.
    """

    def start(self, folder: Path, manifest: Mapping[str, Json]) -> None:
        """A run begins, or goes on after it was stopped: all lines are told again from the first.

        Args:
            folder: of the run; the watcher's own files go into a folder there.
            manifest: of the run, as manifest.json has it.
        """

    def metric(self, step: str, values: Mapping[str, Json]) -> None:
        """A step observed something: a line of metrics.jsonl.

        Args:
            step: its name in the recipe.
            values: by name; of an update of a training its number is "step", counted from 1.
        """

    def step(self, step: str, facts: Mapping[str, Json], measures: Sequence[Measure]) -> None:
        """A step has ended, whether it ran now or came from the store.

        Args:
            step: its name in the recipe.
            facts: as manifest.json has them, such as "status" (done, failed or stopped), "seconds".
            measures: of the report that it made; none where it made something else.
        """

    def end(self, manifest: Mapping[str, Json], page: Path) -> None:
        """The run has ended, well or not.

        Args:
            manifest: as it is now; "status" is done, failed or stopped.
            page: its report.html.
        """


Line = Callable[[str, Mapping[str, "Json"]], object]
Watch = str | Watcher | type[Watcher] | Line


class _Lines(Watcher):
    """A function that is called for each line."""

    def __init__(self, call: Line) -> None:
        self.call = call

    def metric(self, step: str, values: Mapping[str, Json]) -> None:
        self.call(step, values)


class Watched:
    """All watchers of a run: one that fails says so once, and is told nothing more."""

    def __init__(self, watchers: Sequence[tuple[str, Watcher]] = ()) -> None:
        self._watchers, self._started = list(watchers), False

    def tell(self, event: str, *facts: object) -> None:
        """Call the method of that name of each watcher, with copies of `facts`.

        What never began has no end either: that is not told.
        """
        self._started = self._started or event == "start"
        if not self._started:
            return
        for pair in list(self._watchers):
            name, watcher = pair
            try:
                getattr(watcher, event)(*copy.deepcopy(facts))
            except (Exception, SystemExit) as error:
                self._watchers.remove(pair)
                said = private.shown(f"{type(error).__name__}: {error}")
                with contextlib.suppress(BrokenPipeError):  # who does not read it is not told
                    print(
                        f"warning: the watcher {name!r} failed at {event!r} and is told nothing "
                        f"more of this run: {said}",
                        file=sys.stderr,
                    )


def known() -> dict[str, str]:
    """Watchers by name: where each is, as "module:attribute"."""
    return OWN | {point.name: point.value for point in metadata.entry_points(group=GROUP)}


def listed(given: object, where: str) -> list[Watch]:
    """What is to watch, as it is written: names as one text with commas, or a list.

    Raises:
        InputError: something else, or an unknown name.
    """
    if given is None:
        return []
    many = given.split(",") if isinstance(given, str) else given
    if not isinstance(many, Iterable) or isinstance(many, Mapping):
        many = [many]
    found: list[Watch] = []
    for one in cast("Iterable[object]", many):
        if not isinstance(one, (str, Watcher)) and not callable(one):
            fix = f"Give names such as {', '.join(OWN)}; in Python also functions of (step, values)"
            raise InputError("this is no watcher", where=where, seen=one, fix=fix)
        one = one.strip() if isinstance(one, str) else one
        if isinstance(one, str) and one and one not in (names := known()):
            raise unknown("watcher", one, names, where=where)
        found += [cast("Watch", one)] if one != "" else []
    return found


def watched(given: object, planned: object = ()) -> Watched:
    """The watchers of one run, ready to be told; each of them once.

    Args:
        given: to `truing.run`.
        planned: those of the plan; those of the environment come on top.
    Raises:
        InputError: an unknown name, or one whose package is not installed.
    """
    asked: list[Watch] = []
    made: list[tuple[str, Watcher]] = []
    sources = ((given, "watch"), (planned, "watch"), (os.environ.get(VARIABLE), VARIABLE))
    for source, where in sources:
        for one in listed(source, where):
            if one not in asked:
                asked.append(one)
                made.append(_made(one, where))
    return Watched(made)


def _made(one: Watch, where: str) -> tuple[str, Watcher]:
    """(how messages call it, the watcher itself) of a name or of what is given in Python."""
    name = one if isinstance(one, str) else getattr(one, "__qualname__", type(one).__name__)
    try:
        found = _loaded(one) if isinstance(one, str) else one
        found = found() if isinstance(found, type) else found
    except TruingError:
        raise
    except ModuleNotFoundError as error:
        package = (error.name or "?").partition(".")[0]
        raise missing(package, f"{where}: {name}", known().get(name, name)) from error
    except Exception as error:
        said = f"the watcher {name!r} cannot be made: {type(error).__name__}: {error}"
        raise InputError(said, where=where, fix="Leave it out, or mend it") from error
    if not isinstance(found, Watcher) and not callable(found):
        fix = "An entry point names a subclass of truing.watchers.Watcher, or a function"
        raise InputError("this is no watcher", where=f"{where}: {name}", seen=found, fix=fix)
    return name, found if isinstance(found, Watcher) else _Lines(cast(Line, found))


def _loaded(name: str) -> object:
    """The object that a known name stands for, imported."""
    module, _, attribute = known()[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def numbers(step: str, values: Mapping[str, Json]) -> dict[str, float]:
    """The finite numbers of a line, as STEP/NAME; without that of the update, which is a place."""
    return {
        f"{step}/{name}": float(value)
        for name, value in values.items()
        if name != "step" and isinstance(value, (int, float)) and not isinstance(value, bool)
        if math.isfinite(value)
    }


def intervals(step: str, measures: Iterable[Measure]) -> dict[str, float]:
    """The finite numbers of a report as measures/STEP/NAME: values, and the ends of intervals."""
    found: dict[str, float] = {}
    for m in measures:
        name = f"measures/{step}/{m.name}{f', {m.category}' if m.category else ''}"
        found[name] = m.value
        if not m.lo == m.hi == m.value:
            found |= {f"{name}, 95 % from": m.lo, f"{name}, 95 % to": m.hi}
    return {name: value for name, value in found.items() if math.isfinite(value)}

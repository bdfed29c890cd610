"""`Plan`: a graph of steps, checked as a whole before any of it runs.

    plan = Plan("mine", seed=0)
    plan.model("base", "smollm2-135m-instruct")
    plan.step("rules", "specify/principles_file", path="principles.yaml")
    plan.step("after", "evaluate/adherence", model="base", prompts="prompts.jsonl",
              principles="rules")

What is given for an input is the name of a step (an edge), of a model or data set that the plan
names, or a source: a file, a folder, a registered name. Everything else is a setting; a model in
it, as in {use: step_reward, model: prm}, is named in the same way (`truing.naming`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import cast

from truing import renaming, watchers
from truing.core import private
from truing.core.endpoints import limits
from truing.core.files import expanded
from truing.core.modelfiles import choices
from truing.errors import InputError, unknown
from truing.method import methods
from truing.naming import check_reference, is_reference, nouns_in
from truing.quarantine import check_served
from truing.references import referred
from truing.remedies import circular, misfit, missing, unfound, unnamed
from truing.signature import Input, read_value
from truing.steps import Checked as Checked
from truing.steps import Source as Source
from truing.steps import Step, Typed, seed_of
from truing.tables import content_hash

OWN = ("do", "seed")  # what a step's mapping holds besides inputs and settings


class Plan:
    """Steps, models and data sets by name.

    Args:
        name: of the run's folder.
        seed: of every random stream, for steps that have no seed of their own.
        folder: against which relative paths are resolved; the recipe's.
        source: the recipe's path, for errors and the manifest.
    """

    def __init__(
        self, name: str, *, seed: int = 0, folder: Path | None = None, source: str = ""
    ) -> None:
        if not name or not all(c.isalnum() or c in "-_." for c in name) or name[0] == ".":
            raise InputError(
                "a plan's name becomes a folder: use letters, digits, '-', '_'",
                where=source or "plan",
                seen=name,
                fix="Such as name: brief-answers",
            )
        self.name, self.seed, self.source = name, seed, source
        self.folder = folder or Path()
        self.steps: dict[str, Step] = {}
        self.models: dict[str, str] = {}
        self.data: dict[str, str] = {}
        self.places: dict[str, str] = {}  # of "model NAME" and "data NAME", for errors
        self.ready: Callable[[], None] | None = None  # called before checks, such as by a recipe
        self.watch: watchers.Watch | Sequence[watchers.Watch] = ()  # what is told of its runs
        self.command: list[str] = []  # what makes it on the command line, where something does
        self._typed: set[str] = set()  # models and data that the command line named
        self._typed_in: dict[str, str] = {}  # from which directory, where that matters

    def __repr__(self) -> str:
        return f"Plan({self.name}, {len(self.steps)} steps: {', '.join(self.steps)})"

    def model(self, name: str, source: str | Mapping[str, object]) -> str:
        """Name a model: a folder, a registered or hub name, an address, or what it consists of.

        The last is {"endpoint": URL, "model": NAME, "requests": N, ...}, see
        `core.endpoints.limits`.
        """
        text = source if isinstance(source, str) else limits.address(source, where=f"model {name}")
        self.models[name], self.places[f"model {name}"] = text, _caller()
        return name

    def table(self, name: str, source: str | Mapping[str, object]) -> str:
        """Name a table: a file, a folder of a saved one or a data set's name.

        {"file": PATH, "columns": {"prompt": "question"}} renames columns, see `renaming.address`.
        """
        at = f"data {name}"
        text = source if isinstance(source, str) else renaming.address(source, where=at)
        self.data[name], self.places[at] = text, _caller()
        return name

    def step(self, name: str, method: str, *, seed: int | None = None, **given: object) -> str:
        """Add a step, inputs and settings by name; returns `name`, an input of later ones."""
        given = {n: referred(value) for n, value in given.items()}
        return self.add(Step(name, method, given, seed, self.source or _caller()))

    def add(self, step: Step) -> str:
        """Add a step; an InputError when the name is taken, or cannot be said elsewhere."""
        if step.name in self.steps:
            raise InputError("two steps have the same name", where=step.at())
        if not step.name or {"/", "="} & set(step.name):
            raise InputError(
                "a step's name is written in RUN/STEP and STEP.SETTING=VALUE: without '/' and '='",
                where=step.at(),
                seen=step.name,
                fix="Use letters, digits, '-', '_'",
            )
        self.steps[step.name] = step
        return step.name

    def override(self, text: str) -> None:
        """Change one value: "STEP.SETTING=VALUE", "models.NAME=SOURCE" or "seed=N".

        VALUE is read as on the command line of a method: see `Setting.parse`. A relative path in
        it is meant from the current directory, not from the recipe's.
        """
        place, found, written = text.partition("=")
        value = read_value(written)
        head, dotted, rest = place.partition(".")
        shown = private.HIDDEN if rest.rpartition(".")[2] in private.SECRETS else written
        steps = [name for name in self.steps if place.startswith(f"{name}.")]
        if steps:  # a name may have dots, and begin as another one
            head = max(steps, key=len)
            rest = place[len(head) + 1 :]
        if not found or not place:
            raise InputError("written as STEP.SETTING=VALUE", where="--set", seen=text)
        if isinstance(value, str):
            self._note_where(place, value)
        if not dotted:
            if place != "seed":
                known = (
                    f"the steps are {', '.join(self.steps)}" if self.steps else "there is no step"
                )
                fix = f"Write STEP.{place}=VALUE; {known}"
                said = "only seed=N stands without a step"
                raise InputError(said, where="--set", seen=text, fix=fix)
            self.seed = seed_of(value, "--set") or 0
        elif head in ("models", "data") and head not in self.steps:
            named = cast("dict[str, str]", getattr(self, head))
            if rest not in named:
                what = "model" if head == "models" else "data set"
                raise unknown(what, rest, named, where=f"--set {text}")
            if isinstance(value, Mapping):
                made = cast("Mapping[str, object]", value)
                address = limits.address if head == "models" else renaming.address
                written = address(made, where=f"--set {place}")
                self._note_where(place, written)
            named[rest] = value if isinstance(value, str) else written
            self.places[f"{head.removesuffix('s')} {rest}"] = "--set"
            self._typed.add(rest)
        elif head not in self.steps:
            raise unknown("step", head, self.steps, where=f"--set {text}")
        else:
            step = self.steps[head]
            if rest == "do":
                step.method = str(value)
            elif rest == "seed":
                step.seed = seed_of(value, "--set")
            else:
                step.given[rest] = value
            step.typed[rest] = Typed(written, f"--set {place}={shown}")
        if self.command:
            self.command += ["--set", f"{place}={shown}"]

    def _note_where(self, place: str, text: str) -> None:
        """Note from which directory a path was typed, where there is such a file."""
        if any(p.exists() for p in _paths(text)):
            self._typed_in[place] = str(Path.cwd())

    def watched(self, text: str) -> None:
        """Add to what is told of a run, as `--watch` has it: names, with commas between."""
        self.watch = [*watchers.listed(self.watch, "watch"), *watchers.listed(text, "--watch")]
        self.command += ["--watch", text] if self.command else []

    @property
    def key(self) -> str:
        """Hash of what is written; code, files and who watches are not part of it."""
        steps = [
            [
                s.name,
                s.method,
                s.seed,
                {k: limits.without(str(v)) for k, v in private.hidden(s.given).items()},
            ]
            for s in self.steps.values()
        ]
        models = {name: limits.without(text) for name, text in self.models.items()}
        # Two recipes of one text in two folders read different files.
        where = str(self.folder.resolve())
        parts = [where, self.name, self.seed, models, self.data, steps]
        return content_hash([*parts, self._typed_in] if self._typed_in else parts)

    def path(self, text: str | Path, *, typed: bool = False) -> Path:
        """A path as written: beside the recipe where it is there, else as it stands.

        One that was `typed` on the command line stands as it is.
        """
        own = expanded(text)
        beside = self.folder / own
        return beside if beside.exists() and not typed else own

    # Checking

    def check(self) -> list[Checked]:
        """All steps in an order in which they can run; raises InputError at the first mistake."""
        if self.ready is not None:
            self.ready()
        if not self.steps:
            fix = "Write the first below 'steps:', or with plan.step(NAME, METHOD, ...)"
            raise InputError("the plan has no steps", where=self.source or self.name, fix=fix)
        clash = next((n for n in self.steps if n in self.models or n in self.data), None)
        if clash is not None:
            raise InputError(
                "a step has the name of a model or data set", where=self.steps[clash].at()
            )
        checked = {name: self._check(step) for name, step in self.steps.items()}
        for one in checked.values():
            self._check_edges(one, checked)
        ordered = self._ordered(checked)
        check_served(ordered)
        return ordered

    def _check(self, step: Step) -> Checked:
        from truing.core.trainer.preflight import check_given

        try:
            method = methods[step.method]
            inputs, settings = method.inputs, method.settings
        except InputError as error:
            raise _at(error, step.at("do")) from None
        sources: dict[str, dict[str, Source]] = {}
        values: dict[str, object] = {}
        references: dict[str, Mapping[str, object]] = {}
        for name, value in step.given.items():
            if name in inputs and is_reference(name, value):
                references[name] = cast("Mapping[str, object]", value)
                check_reference(name, references[name], where=step.at(name), stored=True)
            elif name in inputs:
                found = self._sources(step, inputs[name], value)
                if found:
                    sources[name] = found
            elif name in settings and name in step.typed:
                values[name] = settings[name].parse(step.typed[name].text, where=step.at(name))
            elif name in settings:
                values[name] = value
            else:
                known = [n for n in (*inputs, *settings, *OWN) if n not in step.given]
                raise unknown("setting", name, known, where=step.at(name), limit=40)
        for name, wanted in inputs.items():
            if wanted.default and not sources.get(name):
                sources[name] = {"": Source(wanted.default)}
            if not wanted.optional and not sources.get(name) and name not in references:
                raise missing(self, step, wanted, method.id)
        for name, value in values.items():
            if value is not None and "Path" in str(settings[name].type):
                values[name] = self.path(str(value), typed=name in step.typed)
        full = method.validate(values, where=step.at(), at=step.at)
        method.check(full, {}, where=step.at(), at=step.at, stored=True, planned=True)
        check_given(full, sources, step.at)
        seed = self.seed if step.seed is None else step.seed
        named = {
            one: self._source(step, Input(one.setting, one.noun), one.text, "setting")
            for one in nouns_in({**full, **references})
        }
        return Checked(step, method, sources, full, seed, named, references)

    def _sources(self, step: Step, wanted: Input, value: object) -> dict[str, Source]:
        if isinstance(value, Mapping) and wanted.many:
            given = {str(k): v for k, v in cast("Mapping[object, object]", value).items()}
        elif isinstance(value, Sequence) and not isinstance(value, str) and wanted.many:
            given = {str(i): v for i, v in enumerate(cast("Sequence[object]", value))}
        else:
            given = {"0" if wanted.many and value is not None else "": value}
        made: dict[str, Source] = {}
        for role, text in given.items():
            if text is None and wanted.optional:
                continue
            if not isinstance(text, (str, Path)):
                raise unnamed(self, step, wanted, text)
            made[role] = self._source(step, wanted, str(text))
        return made

    def _source(self, step: Step, wanted: Input, text: str, sort: str = "input") -> Source:
        if text in self.steps:
            return Source(text, is_step=True)
        nouns = wanted.noun.split("|")
        named = {**(self.models if "Model" in nouns else {})}
        named |= self.data if "Table" in nouns else {}
        name, said = _split(text, nouns)
        found, own = _split(named.get(name, name), nouns)
        typed = name in self._typed if name in named else wanted.name in step.typed
        if "Model" in nouns:
            said = choices.placed(
                choices.joined(own, said), lambda file: self.path(file, typed=typed)
            )
        elif own and said:
            said = f"{own}&{said[1:]}"  # what both name is refused where it is read
        said = said or own
        entry = f"{'data' if 'Table' in nouns and name in self.data else 'model'} {name}"
        at = f"{self.places.get(entry, '')} {entry}".strip() if name in named else ""
        path = self.path(found, typed=typed)
        if "Model" in nouns and (name in named or may_be_model(found)):
            return Source((str(path) if path.exists() else found) + said, at=at)
        if path.exists():
            return Source(str(path) + said, at=at)
        if "Table" in nouns:
            from truing import datasets, shards

            if datasets.knows(found):
                return Source(found + said, at=at)
            for place in [path] if typed else [self.folder / path, path]:
                if shards.local(place):
                    return Source(str(place) + said, at=at)
            if name in named:
                return Source(found + said, at=at)
        raise unfound(self, step, wanted, text, sort=sort, typed=typed)

    def _check_edges(self, one: Checked, checked: Mapping[str, Checked]) -> None:
        for name, wanted, source in one.given():
            if not source.is_step:
                continue
            made = checked[source.text].method.returns
            if made not in wanted.split("|"):
                sort = "input" if name in one.sources else "setting"
                raise misfit(self, one.step, sort, name, wanted, checked[source.text])

    def _ordered(self, checked: dict[str, Checked]) -> list[Checked]:
        done: dict[str, Checked] = {}
        left = dict(checked)
        while left:
            ready = [n for n, c in left.items() if all(e in done for e in c.edges())]
            # A server ends the graph: it runs until it is stopped.
            ready.sort(key=lambda n: left[n].method.verb == "serve")
            if not ready:
                raise circular(self, left)
            done[ready[0]] = left.pop(ready[0])
        return list(done.values())


def _caller() -> str:
    """File and line of the user's code that adds a step; "" where truing itself does."""
    frame = sys._getframe(2)  # pyright: ignore[reportPrivateUsage]
    own = str(frame.f_globals.get("__name__", "")).partition(".")[0] == "truing"
    return "" if own else f"{frame.f_code.co_filename} line {frame.f_lineno}"


def _split(text: str, nouns: Sequence[str]) -> tuple[str, str]:
    """What is named, and what is said behind it: "?thinking=true", or columns to rename."""
    if "Model" in nouns and (found := choices.named(text))[1]:
        return found
    name = renaming.split(text)[0] if "Table" in nouns else text
    return name, text[len(name) :]


def _paths(text: str) -> list[Path]:
    """Where what a text names would be on this machine, whatever is said behind it."""
    return [*choices.paths(text), expanded(renaming.split(text)[0])]


def may_be_model(text: str) -> bool:
    """True for what only opening can tell: addresses, registered names, names of the hub."""
    from truing.core.modelfiles import fetch

    if text.startswith((".", "~", "/")):
        return False
    known = text.startswith(("http://", "https://")) or text in fetch.names()
    return known or text.partition("@")[0].count("/") == 1  # a revision may have slashes


def _at(error: InputError, where: str) -> InputError:
    return type(error)(
        error.message,
        where=" ".join(filter(None, [where, error.where])),
        seen=error.seen,
        fix=error.fix,
    )

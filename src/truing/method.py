"""`@method` and `@component`: a typed function becomes a step, a command and a page of the docs.

The signature is the configuration. Nouns are the inputs; keyword-only parameters are the settings,
with their types and defaults. Nothing else is declared anywhere.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
import types
import typing
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping

from truing import catalogue, described
from truing.catalogue import VERBS, Entry
from truing.components import check_component as check_component
from truing.components import finite as finite
from truing.components import get_component as get_component
from truing.components import one_a_row as one_a_row
from truing.components import resolve as resolve
from truing.components import score as score
from truing.components import told
from truing.context import current, forget, in_part, seeded
from truing.core.bounds import Bounds, check_bounds
from truing.declared import declare, declared, everything, source
from truing.described import Description
from truing.errors import InputError, unknown
from truing.loading import is_loaded, module_of
from truing.own_checks import check_of
from truing.references import Function, any_bare
from truing.signature import Input, Setting, type_name

if typing.TYPE_CHECKING:
    from truing.tables import Table

Row = dict[str, object]
Kinds = Mapping[str, tuple[str, ...]]
Makes = str | Mapping[str, Mapping[str, object]]
F = typing.TypeVar("F", bound=Function)


def method(
    *,
    paper: str = "",
    field: str = "text",
    needs: tuple[str, ...] = (),
    name: str = "",
    verb: str = "",
    group: str = "",
    defaults: Mapping[str, str] | None = None,
    within: Bounds | None = None,
    rows: Kinds | None = None,
    makes: Makes = "",
) -> Callable[[F], F]:
    """Register the decorated function as a method of the verb whose folder it lies in.

    Args (all literals, since the catalogue is read without importing):
        paper: slug of the paper, which is also that of its claim.
        field: "text", "image", "robot", "graph", "series", "scene" or "agent".
        needs: what the models given to it must be able to do: "generate", "logprob", "hidden",
            "weights".
        name: when the registered name differs from the function's.
        verb: where neither a folder nor an entry point says it, as in a script.
        group: when it differs from the sub-folder.
        defaults: data sets that stand in for inputs which are not given; what they hold is then
            part of a step's key.
        within: least and largest value of settings that are numbers, None where none is largest; or
            an interval as text, whose round brackets leave their ends out, such as "(0, 1]".
        rows: kinds of rows that tables may be of, by input: what the function itself expects; for
            any kind ().
        makes: kind of the rows that it returns, or the input whose rows it keeps; where settings
            decide, each kind with those that it is made under, of which the first that fits holds.
    Raises:
        InputError: an unknown verb.
    """

    if verb and verb not in VERBS:
        raise unknown("verb", verb, VERBS)

    def decorate(function: F) -> F:
        facts: dict[str, object] = {
            "paper": paper,
            "field": field,
            "needs": needs,
            "name": name,
            "group": group,
            "defaults": dict(defaults or {}),
            "within": dict(within or {}),
            "rows": dict(rows or {}),
            "makes": makes,
        }
        declare(function, "method", facts, verb=verb)
        function.__dict__["__truing__"] = facts
        return function

    return decorate


def component(kind: str, *, name: str = "") -> Callable[[F], F]:
    """Register a function that steps refer to as `{use: name, **settings}`.

    Kinds with the signature `(rows, *, settings) -> scores`: check, reward and scorer, a finite
    number a row; of a reward also several, by name. Other kinds (decoder, judge, environment,
    embedder, ...) document theirs where they are called.

    Args (literals, since the catalogue is read without importing):
        kind: such as "reward".
        name: when the registered name differs from the function's.
    """

    def decorate(function: F) -> F:
        facts = {"component": kind, "name": name}
        declare(function, "component", facts)
        function.__dict__["__truing__"] = facts
        return function

    return decorate


class Method:
    """A registered method: call it with inputs and settings.

    `id` ("train/dpo"), `verb`, `name`, `group`, `field`, `paper`, `summary` and `needs`, what its
    models must be able to do, cost no import; its module is imported with the first thing beyond.
    Public functions of the module are attributes: `truing.methods["dpo"].loss` is the pure
    objective.
    """

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.id, self.verb, self.name = entry.id, entry.verb, entry.name
        self.group, self.field, self.paper = entry.group, entry.field, entry.paper
        # What an objective needs are measurements; of its models it needs weights to train.
        own = {"objective": ("weights", "logprob"), "online": ("weights", "logprob", "generate")}
        if "scores" in entry.needs:  # a head is trained on reward models, too
            own["objective"] = ("weights", "hidden")
        self.needs = own.get(entry.kind, entry.needs)
        self.summary = entry.summary

    def __repr__(self) -> str:
        return f"<method {self.id}: {self.summary}>"

    @functools.cached_property
    def module(self) -> types.ModuleType:
        """The method's module, imported."""
        return module_of(self.entry)

    @functools.cached_property
    def declared(self) -> Function:
        """The function as written: for an objective, the pure loss."""
        if (own := declared(self.entry)) is not None:
            return own.function
        return typing.cast(Function, getattr(self.module, self.entry.attr))

    @functools.cached_property
    def function(self) -> Function:
        """What runs: the declared function, or the training entry that wraps an objective."""
        return typing.cast(Function, getattr(self.declared, "__truing_entry__", self.declared))

    @property
    def loss(self) -> Function:
        """The pure function of a training method; an online one maps a rollout to its update."""
        if self.entry.kind in ("objective", "online"):
            return self.declared
        return typing.cast(Function, self.module.loss)

    def __getattr__(self, name: str) -> object:
        if name.startswith("_"):
            raise AttributeError(name)
        found = getattr(self.module, name, None)
        if found is None:
            raise AttributeError(f"{self.id} has no public function {name!r}")
        return found

    @property
    def doc(self) -> str:
        """The module's docstring: what it does, its equation, its source."""
        return inspect.getdoc(self.module) or ""

    @functools.cached_property
    def _described(self) -> Description:
        """Its signature and its decorator; as they were the last time where its code is, too."""
        known = None if is_loaded(self.entry) else described.find(self.entry)
        if known is not None:
            return known
        made = described.described(self.declared, self.function, self.doc)
        described.keep(self.entry, made)
        return made

    @property
    def inputs(self) -> dict[str, Input]:
        """Nouns that flow in, by parameter name."""
        return self._described.inputs

    @property
    def settings(self) -> dict[str, Setting]:
        """Settings by name: type, default and meaning of each."""
        return self._described.settings

    @property
    def returns(self) -> str:
        """Name of the noun it returns, such as "Model"."""
        return self._described.returns

    @property
    def facts(self) -> Mapping[str, object]:
        """Arguments of its decorator, such as `within` and `rows`."""
        return self._described.facts

    def validate(
        self,
        values: Mapping[str, object],
        *,
        where: str = "",
        at: Callable[[str], str] | None = None,
    ) -> dict[str, object]:
        """All settings with their defaults; unknown, wrong or missing ones are InputErrors.

        Args:
            values: settings by name.
            where: what errors name; by default the method.
            at: where a given setting stands, such as a line of a recipe; by default `where`.
        """
        where = where or self.id
        for name in values:
            if name not in self.settings:
                near = {n: n for n in self.inputs}
                raise unknown("setting", name, self.settings, where=where, limit=40, near=near)
        checked: dict[str, object] = {}
        for name, setting in self.settings.items():
            if name in values:
                checked[name] = setting.validate(values[name], where=at(name) if at else where)
            elif setting.required:
                raise InputError(
                    f"setting {name!r} is missing",
                    where=where,
                    fix=f"It is of type {type_name(setting.type)}. {setting.doc}".strip(),
                )
            else:
                checked[name] = setting.default
        return checked

    def check(
        self,
        settings: Mapping[str, object],
        tables: Mapping[str, Table],
        *,
        where: str = "",
        at: Callable[[str], str] | None = None,
        stored: bool = False,
        planned: bool = False,
    ) -> None:
        """Raise an InputError for what the method would refuse once its models are in memory.

        Args:
            settings: validated.
            tables: those of its inputs that are at hand, by name; "NAME ROLE" of one of several.
            where: what errors name.
            at: where a given setting or input stands, such as a line of a recipe.
            stored: refuse also what no stored step can have; see `catalogue.check_used`.
            planned: what passed before under the same code need not be asked again.
        """
        from truing.core.identity import code
        from truing.core.trainer import preflight
        from truing.naming import check_settings

        facts = self.facts
        name = next(iter(tables), "").partition(" ")[0]
        try:
            if stored:
                source(self.entry)
                code.read_own()
            catalogue.check_used(settings, stored=stored)
            check_settings(settings)
            check_bounds(settings, typing.cast("Bounds", facts.get("within", {})))
            rows = typing.cast("Kinds", facts.get("rows", {}))
            for given, table in tables.items():
                if kinds := rows.get(given.partition(" ")[0]):
                    name = given.partition(" ")[0]
                    preflight.check_kinds(table, kinds, self.name)
            if self._described.checks:
                self._own_check(settings, tables, planned)
        except InputError as error:
            named = re.match(r"setting '(\w+)'", error.message)
            place = at(named[1] if named else name) if at else where
            inner = "" if error.where == self.name else error.where
            error.where = f"{place}: {inner}".strip(": ")
            raise

    def _own_check(
        self, settings: Mapping[str, object], tables: Mapping[str, Table], planned: bool
    ) -> None:
        """Ask its own function, which may need PyTorch; see `check`."""
        from truing import keys
        from truing.core.identity import code, remembered

        asked = keys.asked(self, settings, tables) if planned else ""
        if asked and not is_loaded(self.entry) and remembered.find(asked):
            return
        if (check := check_of(self.declared)) is not None:
            with told(check, "its check", self.id):
                check(settings, tables)
        if asked and code.settled(keys.modules_of(self, settings, {})):
            remembered.keep(asked, True)

    def __call__(self, *nouns: object, seed: int | None = None, **values: object) -> typing.Any:
        """Run it: inputs by position or name, settings by name; the noun that `returns` names.

        Args:
            nouns: Model, Table, Principles, Report; or the name, path or address of one; or rows,
                a list of dicts or a `datasets.Dataset`. An input of several takes a dict by role.
            seed: of every random stream; None takes that of the step around, outside of any 0.
            values: inputs and settings by name. A component is {"use": name, ...} or a function.
        Raises:
            InputError: an input or setting is missing, unknown, out of bounds or of another kind.
        """
        from truing import given
        from truing.datasets import licensed
        from truing.naming import holding
        from truing.quarantine import marked

        if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool)):
            raise InputError("the seed must be a whole number", where=self.id, seen=seed)
        asked = given.by_name(self, nouns, values)
        settings = self.validate({n: v for n, v in values.items() if n not in self.inputs})
        named = given.opened(self, asked, lambda tables: self.check(settings, tables))
        settings = holding(settings, where=self.id)
        with seeded(seed), self._noting(settings, named):
            made = licensed(self.function(**named, **settings), named)
        return marked(made, self, named, settings)

    @contextlib.contextmanager
    def _noting(self, settings: Mapping[str, object], nouns: Row) -> Generator[None]:
        """Where functions of the user's own run, no note of other ones is found.

        Of plain calls none from before, since they may read globals that changed; in a folder of
        one's own each version of their code has a part.
        """
        from truing import keys

        own, found = False, list[Entry]()
        if everything() or any_bare():
            try:
                found = keys.entries_of(self, settings, typing.cast("keys.Nouns", nouns))
                own = any(declared(entry) is not None for entry in found)
            except InputError:  # a function that is given as it is, which no folder can keep
                if current().stored:
                    raise
                own = True
        if own:
            forget()
        with contextlib.ExitStack() as stack:
            if own and current().stored:
                stack.enter_context(in_part(f"code-{keys.code_of(found)[:8]}"))
            yield


class Methods(Mapping[str, Method]):
    """All methods, by `verb/name` or by a bare name that is unique; iterating gives the ids.

    `methods["dpo"]` is a `Method`; an unknown name is an InputError that offers the nearest one.
    """

    def __init__(self) -> None:
        self._made: dict[str, Method] = {}

    def __getitem__(self, name: str) -> Method:
        entry = catalogue.find(name)
        if declared(entry) is not None:
            return Method(entry)  # it may be another function than before
        if entry.id not in self._made:
            self._made[entry.id] = Method(entry)
        return self._made[entry.id]

    def __iter__(self) -> Iterator[str]:
        return iter(catalogue.methods())

    def __len__(self) -> int:
        return len(catalogue.methods())

    def __repr__(self) -> str:
        verbs = Counter(name.partition("/")[0] for name in self)
        return f"<{len(self)} methods: {', '.join(f'{n} of {verb}' for verb, n in verbs.items())}>"

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and len(catalogue.called(name)) == 1


methods = Methods()

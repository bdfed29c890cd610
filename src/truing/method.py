"""`@method` and `@component`: a typed function becomes a step, a command and a page of the docs.

The signature is the configuration. Nouns are the inputs; keyword-only parameters are the settings,
with their types and defaults. Nothing else is declared anywhere.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import math
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from truing import catalogue
from truing.catalogue import Entry
from truing.errors import InputError, MissingExtra, unknown

Row = dict[str, object]
Function = Callable[..., object]
F = typing.TypeVar("F", bound=Function)
NOUNS = ("Model", "Table", "Principles", "Report")
REQUIRED = inspect.Parameter.empty


def method(
    *,
    paper: str = "",
    field: str = "text",
    needs: tuple[str, ...] = (),
    name: str = "",
    group: str = "",
) -> Callable[[F], F]:
    """Register the decorated function as a method of the verb whose folder it lies in.

    Args (all literals, since the catalogue is read without importing):
        paper: slug of the method card, which is also the slug of its claim.
        field: "text", "image", "robot", "graph", "series", "scene" or "agent".
        needs: what the models given to it must be able to do: "generate", "logprob", "hidden",
            "weights".
        name: when the registered name differs from the function's.
        group: when it differs from the sub-folder.
    """

    def decorate(function: F) -> F:
        function.__dict__["__truing__"] = {
            "paper": paper,
            "field": field,
            "needs": needs,
            "name": name,
            "group": group,
        }
        return function

    return decorate


def component(kind: str, *, name: str = "") -> Callable[[F], F]:
    """Register a function that steps refer to as `{use: name, **settings}`.

    Kinds with the signature `(rows, *, settings) -> scores`: check, reward, scorer. Other kinds
    (decoder, judge, environment, ...) document theirs where they are called.
    """

    def decorate(function: F) -> F:
        function.__dict__["__truing__"] = {"component": kind, "name": name}
        return function

    return decorate


@dataclass(frozen=True)
class Setting:
    """One keyword parameter of a method: the name, type, default and meaning that users see."""

    name: str
    type: object
    default: object
    doc: str = ""

    @property
    def required(self) -> bool:
        """True when there is no default."""
        return self.default is REQUIRED

    def validate(self, value: object, *, where: str = "") -> object:
        """`value` as the declared type, or an InputError that names the setting."""
        import pydantic

        try:
            return pydantic.TypeAdapter(self.type).validate_python(value, strict=False)
        except pydantic.ValidationError as error:
            problem = error.errors()[0]["msg"]
            raise InputError(
                f"setting {self.name!r}: {problem[0].lower()}{problem[1:]}",
                where=where,
                seen=value,
                fix=f"It is of type {type_name(self.type)}",
            ) from None

    def parse(self, text: str, *, where: str = "") -> object:
        """The value that a user typed on the command line: JSON where it is, else the text."""
        if self.type is str:
            return text
        try:
            value: object = json.loads(text)
        except ValueError:
            value = text
        return self.validate(value, where=where)


@dataclass(frozen=True)
class Input:
    """One noun that flows into a method: `noun` is "Model", "Table", ...; `many` for roles."""

    name: str
    noun: str
    optional: bool = False
    many: bool = False


def type_name(annotation: object) -> str:
    """A type as users read it."""
    if isinstance(annotation, type) and not typing.get_args(annotation):
        return annotation.__name__
    text = re.sub(r"\b(typing|collections\.abc|truing\.\w+)\.", "", str(annotation))
    return text.replace("NoneType", "None")


def _noun(annotation: object) -> tuple[str, bool, bool] | None:
    """(noun, optional, many) when the annotation is made of nouns, else None."""
    if isinstance(annotation, type) and annotation.__name__ in NOUNS:
        return annotation.__name__, False, False
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        nouns = [_noun(a) for a in args if a is not type(None)]
        if nouns and all(nouns):
            names = "|".join(n[0] for n in nouns if n)
            return names, type(None) in args, any(n[2] for n in nouns if n)
    if origin in (dict, list) or (isinstance(origin, type) and issubclass(origin, Sequence)):
        inner = _noun(args[-1]) if args else None
        return (inner[0], False, True) if inner else None
    return None


def argument_docs(text: str) -> dict[str, str]:
    """What the "Args:" section of a docstring says of each parameter."""
    docs: dict[str, str] = {}
    section = re.search(r"^Args[^\n]*:\n(.*?)(?:\n\S|\Z)", inspect.cleandoc(text), re.S | re.M)
    last = ""
    for line in section[1].splitlines() if section else []:
        head = re.match(r"^ {2,4}(\w+)(?: \([^)]*\))?: (.*)$", line)
        if head:
            last = head[1]
            docs[last] = head[2].strip()
        elif last and line.strip():
            docs[last] += " " + line.strip()
    return docs


class Method:
    """A registered method; its module is imported when the first thing beyond `entry` is asked.

    Calling it calls the function with validated settings. Public functions of its module are
    attributes: `truing.methods["dpo"].loss` is the pure objective.
    """

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.id, self.verb, self.name = entry.id, entry.verb, entry.name
        self.group, self.field, self.paper = entry.group, entry.field, entry.paper
        # What an objective needs are measurements; of its models it needs weights to train.
        self.needs = ("weights", "logprob") if entry.kind == "objective" else entry.needs
        self.summary = entry.summary

    def __repr__(self) -> str:
        return f"<method {self.id}: {self.summary}>"

    @functools.cached_property
    def module(self) -> types.ModuleType:
        """The method's module, imported."""
        try:
            return importlib.import_module(self.entry.module)
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("truing"):
                raise
            raise MissingExtra(error.name or "?", self.verb, where=self.id) from error

    @functools.cached_property
    def declared(self) -> Function:
        """The function as written: for an objective, the pure loss."""
        return typing.cast(Function, getattr(self.module, self.entry.attr))

    @functools.cached_property
    def function(self) -> Function:
        """What runs: the declared function, or the training entry that wraps an objective."""
        return typing.cast(Function, getattr(self.declared, "__truing_entry__", self.declared))

    @property
    def loss(self) -> Function:
        """The pure objective of a training method."""
        if self.entry.kind == "objective":
            return self.declared
        return typing.cast(Function, getattr(self.module, "loss"))

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
    def _parameters(self) -> tuple[dict[str, Input], dict[str, Setting], str]:
        function = self.function
        hints = typing.get_type_hints(function, include_extras=True)
        docs = argument_docs(self.doc) | argument_docs(inspect.getdoc(self.declared) or "")
        docs |= argument_docs(inspect.getdoc(function) or "")
        inputs: dict[str, Input] = {}
        settings: dict[str, Setting] = {}
        for name, parameter in inspect.signature(function).parameters.items():
            annotation = hints.get(name, str)
            noun = _noun(annotation)
            if noun is not None:
                optional = noun[1] or parameter.default is not REQUIRED
                inputs[name] = Input(name, noun[0], optional, noun[2])
            else:
                settings[name] = Setting(name, annotation, parameter.default, docs.get(name, ""))
        return inputs, settings, type_name(hints.get("return", type(None)))

    @property
    def inputs(self) -> dict[str, Input]:
        """Nouns that flow in, by parameter name."""
        return self._parameters[0]

    @property
    def settings(self) -> dict[str, Setting]:
        """Settings by name."""
        return self._parameters[1]

    @property
    def returns(self) -> str:
        """Name of the noun it returns."""
        return self._parameters[2]

    def validate(self, values: Mapping[str, object], *, where: str = "") -> dict[str, object]:
        """All settings with their defaults; unknown or missing ones are InputErrors."""
        where = where or self.id
        for name in values:
            if name not in self.settings:
                raise unknown("setting", name, self.settings, where=where, limit=40)
        checked: dict[str, object] = {}
        for name, setting in self.settings.items():
            if name in values:
                checked[name] = setting.validate(values[name], where=where)
            elif setting.required:
                raise InputError(
                    f"setting {name!r} is missing",
                    where=where,
                    fix=f"It is of type {type_name(setting.type)}. {setting.doc}".strip(),
                )
            else:
                checked[name] = setting.default
        return checked

    def __call__(self, *nouns: object, **values: object) -> object:
        """Run it: inputs by position or name, settings by name."""
        named = dict(zip(self.inputs, nouns, strict=False))
        if len(nouns) > len(self.inputs):
            raise InputError(f"takes {len(self.inputs)} inputs", where=self.id, seen=len(nouns))
        named |= {n: values.pop(n) for n in list(values) if n in self.inputs}
        for name, wanted in self.inputs.items():
            if name not in named and not wanted.optional:
                raise InputError(f"input {name!r} ({wanted.noun}) is missing", where=self.id)
        return self.function(**named, **self.validate(values))


class Methods(Mapping[str, Method]):
    """All methods, by `verb/name` or by a bare name that is unique; iterating gives the ids."""

    def __init__(self) -> None:
        self._made: dict[str, Method] = {}

    def __getitem__(self, name: str) -> Method:
        entry = catalogue.find(name)
        if entry.id not in self._made:
            self._made[entry.id] = Method(entry)
        return self._made[entry.id]

    def __iter__(self) -> Iterator[str]:
        return iter(catalogue.methods())

    def __len__(self) -> int:
        return len(catalogue.methods())

    def __contains__(self, name: object) -> bool:
        try:
            return isinstance(name, str) and bool(catalogue.find(name))
        except InputError:
            return False


methods = Methods()


def check_component(kind: str, ref: Mapping[str, object], *, where: str = "") -> None:
    """Raise an InputError unless `ref` names a registered component with valid settings."""
    resolve(kind, ref, where=where)


def resolve(
    kind: str, ref: Mapping[str, object], *, where: str = ""
) -> tuple[Function, dict[str, object]]:
    """The component's function and its validated settings."""
    name = ref.get("use")
    if not isinstance(name, str):
        raise InputError(
            f"a {kind} is written {{use: name, ...settings}}", where=where, seen=dict(ref)
        )
    known = catalogue.components(kind)
    entry = known.get(name.replace("-", "_"))
    if entry is None:
        raise unknown(kind, name, known, where=where)
    function = Method(entry)
    settings = {k: v for k, v in ref.items() if k != "use"}
    keyword_only = {
        n
        for n, p in inspect.signature(function.function).parameters.items()
        if p.kind is inspect.Parameter.KEYWORD_ONLY
    }
    allowed = {n: s for n, s in function.settings.items() if n in keyword_only}
    checked: dict[str, object] = {}
    for key, value in settings.items():
        if key not in allowed:
            raise unknown("setting", key, allowed, where=f"{where} {kind} {name}".strip())
        checked[key] = allowed[key].validate(value, where=f"{where} {kind} {name}".strip())
    for key, setting in allowed.items():
        if setting.required and key not in checked:
            raise InputError(
                f"setting {key!r} is missing", where=f"{where} {kind} {name}".strip()
            )
    return function.function, checked


def get_component(
    kind: str, ref: Mapping[str, object] | str, *, where: str = ""
) -> Callable[..., object]:
    """The component that `ref` names, its settings bound: call it with the remaining arguments."""
    function, settings = resolve(kind, {"use": ref} if isinstance(ref, str) else ref, where=where)
    return functools.partial(function, **settings)


def score(
    kind: str, ref: Mapping[str, object] | str, rows: Sequence[Row], *, where: str = ""
) -> list[float]:
    """Scores of `rows` under a check, reward or scorer: same length, finite, or an InputError."""
    name = ref if isinstance(ref, str) else str(ref.get("use"))
    values = get_component(kind, ref, where=where)(list(rows))
    if not isinstance(values, list) or len(values) != len(rows):
        got = len(values) if isinstance(values, Sequence) else type(values).__name__
        raise InputError(
            f"{kind} {name!r} must return one score a row",
            where=where,
            seen=f"{got} for {len(rows)} rows",
        )
    checked: list[float] = []
    for i, value in enumerate(typing.cast(list[object], values)):
        number = float(value) if isinstance(value, (int, float)) else math.nan
        if not math.isfinite(number):
            raise InputError(
                f"{kind} {name!r} returned a score that is not a finite number",
                where=f"{where} row {i + 1}".strip(),
                seen=value,
            )
        checked.append(number)
    return checked

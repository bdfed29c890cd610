"""What a method's signature says: its inputs and settings, with their types and meanings."""

from __future__ import annotations

import contextlib
import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from truing import jsontext
from truing.errors import InputError
from truing.references import referred

NOUNS = ("Model", "Table", "Principles", "Report")
# What errors of pydantic's say in place of its own words.
SAID = {"finite_number": "must be finite", "dict_type": "must be a mapping, {name: value}"}
_EXAMPLE = re.compile(r"\{(?:[^{}]|\{[^{}]*\})*\}")  # with one mapping inside at most
_TOLD = re.compile(r"[\s\"']")  # what a name has not
REQUIRED = inspect.Parameter.empty


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
        """`value` as the declared type, or an InputError that names the setting.

        A function where a component's reference is wanted becomes one.
        """
        import pydantic

        if _refers(self.type):
            value = referred(value)
        if _numbers(self.type) and _has_truth(value):
            said = ": must be a number, not true or false (YAML's yes, no, on and off are these)"
            raise self._wrong(said, value, where)
        # Settings are JSON, which has no NaN and no infinity.
        finite = pydantic.ConfigDict(allow_inf_nan=False)
        try:
            adapter = pydantic.TypeAdapter(typing.cast("type[object]", self.type), config=finite)
            return adapter.validate_python(value, strict=False)
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            problem = SAID.get(first["type"], first["msg"])
            inner = first["loc"][:1]  # of a union it may be the name of a type
            known = typing.cast("Mapping[object, object]", value)
            at = (
                f", entry {inner[0]!r}"
                if inner and isinstance(value, Mapping) and inner[0] in known
                else ""
            )
            said = f"{at}: {problem[0].lower()}{problem[1:]}"
            raise self._wrong(said, value, where) from None

    def _wrong(self, said: str, value: object, where: str) -> InputError:
        from truing.core import private

        return InputError(
            f"setting {self.name!r}{said}",
            where=where,
            seen=private.hide(self.name, value),
            fix=f"It is of type {type_name(self.type)}{self._example()}",
        )

    def _example(self) -> str:
        """The first mapping that its meaning shows, where it is one; how a list is written."""
        if "dict[" not in type_name(self.type):
            listed = type_name(self.type).startswith(("list[", "tuple["))
            example = "[1, 2]" if _numbers(self.type) else '["a", "b"]'
            return f", such as {example}" if listed else ""
        shown = _EXAMPLE.search(self.doc)
        if shown is None and not _refers(self.type):
            return ""
        return f", such as {shown[0] if shown else '{use: NAME, ...settings}'}"

    def parse(self, text: str, *, where: str = "") -> object:
        """The value that a user typed on the command line.

        As `read_value` has it; else the text, a number or null among them; of a list also names
        or numbers between commas, which have no quotes and no white space: with these in it, none
        can tell where an entry ends.
        """
        if self.type is str:
            return text
        value = read_value(text)
        others: list[object] = [text] if value != text else []
        listed = [one.strip(" ") for one in text.split(",")]
        if all(listed) and not text.startswith(("[", "{")) and not _TOLD.search("".join(listed)):
            others.append(listed)
        try:
            return self.validate(value, where=where)
        except InputError:
            for other in others:
                with contextlib.suppress(InputError):
                    return self.validate(other, where=where)
            raise


def read_value(text: str) -> object:
    """What was typed: JSON where it is; `{use: name, n: 3}` and `[a, b]` also as YAML has them."""
    found = jsontext.loads_or_text(text)
    return flow(text) if found == text else found


def flow(text: str) -> object:
    """What a mapping or list in YAML's flow form says, `{use: name, n: 3}`; other text as it is."""
    import yaml

    if text[:1] not in ("{", "["):
        return text
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: of what looks like a date
        return text


@dataclass(frozen=True)
class Input:
    """One noun that flows into a method: `noun` is "Model", "Table", ...; `many` for roles.

    `default` is the data set that stands in for one that is not given, "" for none.
    """

    name: str
    noun: str
    optional: bool = False
    many: bool = False
    default: str = ""


def type_name(annotation: object) -> str:
    """A type as users read it."""
    if isinstance(annotation, type) and not typing.get_args(annotation):
        return annotation.__name__
    text = re.sub(r"\b(typing|collections\.abc|truing\.\w+)\.", "", str(annotation))
    text = re.sub(r"Annotated\[(\w+), [^\]]*\]", r"\1", text)
    return text.replace("NoneType", "None")


def _refers(annotation: object) -> bool:
    """True for types that hold a component's reference, which is a `dict[str, object]`."""
    return annotation == dict[str, object] or any(map(_refers, typing.get_args(annotation)))


def _leaves(annotation: object) -> list[object]:
    """What a type is made of, at whatever depth."""
    args = typing.get_args(annotation)
    return [leaf for one in args for leaf in _leaves(one)] if args else [annotation]


def _numbers(annotation: object) -> bool:
    """True for types that hold numbers, and nothing that true or false could be."""
    leaves, open_to = _leaves(annotation), (bool, object, typing.Any)
    return any(n in leaves for n in (int, float)) and not any(t in leaves for t in open_to)


def _has_truth(value: object) -> bool:
    """True for true or false, and for a mapping or list that holds one."""
    if isinstance(value, Mapping):
        value = list(typing.cast("Mapping[object, object]", value).values())
    if isinstance(value, (list, tuple)):
        return any(map(_has_truth, typing.cast("Sequence[object]", value)))
    return isinstance(value, bool)


def noun_of(annotation: object) -> tuple[str, bool, bool] | None:
    """(noun, optional, many) when the annotation is made of nouns, else None."""
    if isinstance(annotation, type) and annotation.__name__ in NOUNS:
        return annotation.__name__, False, False
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        nouns = [noun_of(a) for a in args if a is not type(None)]
        if nouns and all(nouns):
            names = "|".join(n[0] for n in nouns if n)
            return names, type(None) in args, any(n[2] for n in nouns if n)
    if origin in (dict, list) or (
        isinstance(origin, type) and issubclass(typing.cast(type, origin), Sequence)
    ):
        inner = noun_of(args[-1]) if args else None
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


def class_docs(kind: type) -> dict[str, str]:
    """What the "Args:" of a class and of those above it say of each; its own words go before."""
    said = [argument_docs(vars(one).get("__doc__") or "") for one in reversed(kind.__mro__)]
    return {name: text for docs in said for name, text in docs.items()}


def parameters_of(
    function: Callable[..., object], docs: Mapping[str, str], defaults: Mapping[str, str]
) -> tuple[dict[str, Input], dict[str, Setting], str]:
    """Inputs and settings of a function by name, and the type that it returns.

    Args:
        docs: what is said of each parameter; the function's own docstring goes before.
        defaults: data sets that stand in for inputs.
    """
    hints = typing.get_type_hints(function, include_extras=True)
    said = {**docs, **argument_docs(inspect.getdoc(function) or "")}
    inputs: dict[str, Input] = {}
    settings: dict[str, Setting] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        annotation = hints.get(name, str)
        noun = noun_of(annotation)
        if noun is not None:
            optional = noun[1] or parameter.default is not REQUIRED
            inputs[name] = Input(name, noun[0], optional, noun[2], defaults.get(name, ""))
        else:
            settings[name] = Setting(name, annotation, parameter.default, said.get(name, ""))
    return inputs, settings, type_name(hints.get("return", type(None)))

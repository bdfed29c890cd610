"""What a function says of itself by its signature and its decorator, known by its code.

To know a method's inputs and settings its module has to be imported, and PyTorch with it. What was
seen then is kept under the hash of the texts that the module is made of, so that a method that does
not run need not be imported a second time. Nothing is kept that would not come back the same.
"""

from __future__ import annotations

import ast
import inspect
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from truing.core.held_out import INPUT as HELD_OUT
from truing.core.held_out import Watch
from truing.declared import declared
from truing.entry import Entry
from truing.own_checks import check_of
from truing.signature import REQUIRED, Input, Setting, argument_docs, class_docs, parameters_of

Record = dict[str, object]
KEYWORD_ONLY = inspect.Parameter.KEYWORD_ONLY
# What types of settings are written with.
NAMES: dict[str, object] = {
    **{t.__name__: t for t in (int, float, str, bool, object, dict, list, tuple, set, Path)},
    "Annotated": typing.Annotated,
    "Literal": typing.Literal,
    "Mapping": Mapping,
    "Optional": typing.Optional,
    "Sequence": Sequence,
    "Union": typing.Union,
}


MAKERS = (
    "truing.described",
    "truing.core.trainer.preflight",
)  # what makes of a module what is kept
_kept: set[Entry] = set()  # of this process


@dataclass(frozen=True)
class Description:
    """What is known of a method or component.

    Args:
        inputs: nouns by parameter name.
        settings: by name.
        returns: name of the noun that it returns.
        facts: arguments of its decorator.
        checks: whether it has a function of its own that checks settings and tables.
    """

    inputs: dict[str, Input]
    settings: dict[str, Setting]
    returns: str
    facts: Mapping[str, object] = field(default_factory=dict)
    checks: bool = False


def described(written: object, function: typing.Callable[..., object], doc: str) -> Description:
    """The description of a function.

    Args:
        written: the function, with what its decorator left there.
        function: what is called, which may stand around it. Where it takes held-out rows, `Watch`
            says what the settings mean of which its docstring does not.
        doc: of its module.
    """
    facts = cast("Mapping[str, object]", getattr(written, "__truing__", {}))
    takes = inspect.signature(function).parameters
    docs = class_docs(Watch) if HELD_OUT in takes else {}
    docs |= argument_docs(doc) | argument_docs(inspect.getdoc(written) or "")
    defaults = cast("Mapping[str, str]", facts.get("defaults", {}))
    inputs, settings, returns = parameters_of(function, docs, defaults)
    if "component" in facts:  # what it is called with, such as rows, nobody sets
        settings = {n: s for n, s in settings.items() if takes[n].kind is KEYWORD_ONLY}
    return Description(inputs, settings, returns, facts, check_of(written) is not None)


def find(entry: Entry) -> Description | None:
    """What is known of a registered function whose code is as it was; None for nothing."""
    from truing.core.identity import remembered

    found = remembered.find(name) if (name := _name(entry)) else None
    return _read(cast(Record, found)) if isinstance(found, dict) else None


def keep(entry: Entry, made: Description) -> None:
    """Keep what was seen of a function, where its code is what lies on the disk."""
    from truing.core.identity import code, remembered

    name = "" if entry in _kept or declared(entry) is not None else _name(entry)
    _kept.add(entry)
    if name and code.settled([entry.module]) and remembered.find(name) is None:
        record = _written(made)
        if repr(_read(record)) == repr(made):
            remembered.keep(name, record)


def _name(entry: Entry) -> str:
    from truing.core.identity import code, remembered
    from truing.tables import content_hash

    text = code.text_key([entry.module, *MAKERS])
    return content_hash([entry.id, entry.attr, text, remembered.installed()]) if text else ""


def _written(made: Description) -> Record:
    return {
        "inputs": [list(vars(one).values()) for one in made.inputs.values()],
        "settings": [
            [s.name, _text(s.type), None if s.required else repr(s.default), s.doc]
            for s in made.settings.values()
        ],
        "returns": made.returns,
        "facts": repr(dict(made.facts)),
        "checks": made.checks,
    }


def _read(record: Record) -> Description | None:
    """What `_written` wrote; None where something in it is no literal, or no type known here."""
    try:
        inputs = [Input(*one) for one in cast("list[list[typing.Any]]", record["inputs"])]
        settings = [
            Setting(
                name,
                _type(ast.parse(type_, mode="eval").body),
                REQUIRED if default is None else ast.literal_eval(default),
                doc,
            )
            for name, type_, default, doc in cast("list[list[str]]", record["settings"])
        ]
        facts = cast("Mapping[str, object]", ast.literal_eval(str(record["facts"])))
        returns, checks = str(record["returns"]), bool(record["checks"])
    except (LookupError, TypeError, ValueError, SyntaxError):
        return None
    named = {one.name: one for one in inputs}, {one.name: one for one in settings}
    return Description(*named, returns, facts, checks)


def _text(annotation: object) -> str:
    plain = isinstance(annotation, type) and not typing.get_args(annotation)
    return cast(type, annotation).__name__ if plain else repr(annotation)


def _type(node: ast.expr) -> object:
    """The type that an expression stands for; a ValueError for what `NAMES` has not."""
    match node:
        case ast.Constant():
            return node.value
        case ast.Name(id=name) | ast.Attribute(attr=name) if name in NAMES:
            return NAMES[name]
        case ast.Tuple():
            return tuple(_type(one) for one in node.elts)
        case ast.Subscript():
            return cast("Mapping[object, object]", _type(node.value))[_type(node.slice)]
        case ast.BinOp(op=ast.BitOr()):
            return cast(typing.Any, _type(node.left)) | _type(node.right)
        case ast.Call(func=ast.Name(id="Key"), keywords=[ast.keyword(arg="noun", value=noun)]):
            from truing.naming import Key

            return Key(str(ast.literal_eval(noun)))
        case _:
            raise ValueError("no type of a setting")

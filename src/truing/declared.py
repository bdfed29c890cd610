"""Functions that a script, a notebook or a recipe registers, found by name in its own process.

A step that uses one has the code of its file in its key, so an edited one runs again.
"""

from __future__ import annotations

import inspect
import tokenize
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from truing.context import forget
from truing.entry import Entry, place_of, said
from truing.errors import InputError
from truing.own_checks import refuse_unasked
from truing.references import Function


@dataclass(frozen=True)
class Declared:
    """A function that a script, a notebook or a recipe registered by a decorator.

    Args:
        entry: as the catalogue has it; its verb is "" for a method that was given none.
        text: of its file as it was then; None where it stands in none, as in a notebook.
    """

    entry: Entry
    function: Function
    text: str | None


_declared: dict[tuple[str, str], Declared] = {}
_left_out: dict[str, str] = {}  # by kind, the last function that got no name, and where it stands


def declare(function: Function, kind: str, facts: Mapping[str, object], *, verb: str = "") -> None:
    """Let a function be found by name in this process; every decorator calls it.

    truing's own are in the catalogue anyway. Inside another function one may differ from call to
    call, so that its name would not say which it is: it is left out.

    Args:
        kind: name of the decorator; facts: its arguments, as `scan` reads them.
        verb: of a method.
    Raises:
        InputError: it is no function with a name of its own.
    """
    if not hasattr(function, "__qualname__") or not hasattr(function, "__dict__"):
        raise InputError(
            f"@{kind} registers functions and classes, which have a name of their own",
            seen=repr(function),
            fix="Write def NAME(rows): return ..., which calls it, and register that",
        )
    if kind in ("component", "method"):
        refuse_unasked(function, str(facts.get("component", kind)))
    module, attr = function.__module__, function.__qualname__
    if module.partition(".")[0] == "truing":
        return
    if "<locals>" in attr:
        if kind == "component":
            _leave_out(function, str(facts["component"]))
        return
    code = getattr(inspect.unwrap(function), "__code__", None)
    path = Path(code.co_filename).absolute() if code is not None else Path()
    text = _text(path)
    entry = Entry(
        name=function.__name__,
        kind=kind,
        verb=verb,
        group="",
        module=module,
        attr=attr,
        summary=(inspect.getdoc(function) or "").split("\n", 1)[0],
        path=str(path) if text is not None else "",
        line=code.co_firstlineno if code is not None else 0,
        package=path.name if text is not None else module,
    )
    place = (entry.path or module, attr)
    before = _declared.get(place)
    if before is not None and (text is None or text != before.text):
        forget()  # what plain calls have noted may be of the code before
    _declared[place] = Declared(said(entry, facts), function, text)


def _leave_out(function: Function, kind: str) -> None:
    code = getattr(function, "__code__", None)
    at = f" ({code.co_filename} line {code.co_firstlineno})" if code is not None else ""
    _left_out.pop(kind, None)  # the last is to be the last
    _left_out[kind] = f"{function.__qualname__}{at}"


def _text(path: Path) -> str | None:
    try:
        with tokenize.open(path) as file:  # which knows of byte order marks and other encodings
            return file.read()
    except (OSError, UnicodeDecodeError, SyntaxError):
        return None


def declared(entry: Entry) -> Declared | None:
    """What was declared under this entry; None for an installed one."""
    found = _declared.get((entry.path or entry.module, entry.attr))
    return found if found is not None and found.entry == entry else None


def source(entry: Entry) -> Declared | None:
    """A declared function with the code that a stored step depends on; None for an installed one.

    Raises:
        InputError: its code is in no file.
    """
    found = declared(entry)
    if found is not None and found.text is None:
        raise InputError(
            f"the code of {entry.id!r} is in no file, so nothing would tell its next version from "
            "this one",
            where=place_of(entry),
            fix="Write it into a .py file and import that, or call the method outside a plan and "
            "without a folder of its own",
        )
    return found


def drop(gone: Callable[[Entry], bool]) -> None:
    """Let go of the declared functions of which `gone` is true."""
    for place in [p for p, one in _declared.items() if gone(one.entry)]:
        del _declared[place]
    _left_out.clear()


def left_out(kind: str) -> str:
    """Why the last of a kind ("component": any) that got no name has none; "" where all have."""
    last = next((t for k, t in reversed(_left_out.items()) if kind in (k, "component")), "")
    return last and (
        f"{last} is not registered, since it stands inside another function: move it to the top "
        "level of its file; a decorator under @component needs functools.wraps. "
    )


def everything() -> list[Declared]:
    """All that was declared, in that order."""
    return list(_declared.values())

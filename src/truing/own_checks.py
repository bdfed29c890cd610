"""What a method or component refuses before anything runs, by functions beside it: `@checks`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

from truing.errors import InputError

Check = Callable[..., object]
F = TypeVar("F", bound=Callable[..., object])
BEFORE, ROWS = "__truing_check__", "__truing_rows__"
# What is asked of which kinds of components, and of methods.
ASKED = {BEFORE: ("reward", "check", "judge", "method"), ROWS: ("reward", "check")}
FIX = "Write @checks(FUNCTION) between @component or @method and its def"


def checks(before: Check | None = None, *, rows: Check | None = None) -> Callable[[F], F]:
    """Let functions refuse what the decorated method or component would fail on later.

    They raise an InputError; what they return counts for nothing. `@checks` stands between
    `@component` or `@method` and the function.

    Args:
        before: of a reward, check or judge takes its settings by name, those that are given; of a
            method all of its settings, and by name those of its tables that are there already: a
            plan's are checked before it runs, when those that its steps make are not.
        rows: of a reward takes the rows of the data, before anything is drawn for them, and of its
            settings those that it has parameters for.
    Raises:
        InputError: no function is given, or it does not stand where it is found.
    """
    given = [one for one in (before, rows) if one is not None]
    if not given or not all(map(callable, given)):
        raise InputError("@checks takes functions", seen=given, fix=FIX)

    def decorate(function: F) -> F:
        if not hasattr(function, "__qualname__"):
            raise InputError("@checks stands above a function", seen=function, fix=FIX)
        for name, one in ((BEFORE, before), (ROWS, rows)):
            if hasattr(function, name) or hasattr(function, "__truing__"):
                said = "@checks stands once, below the decorator that registers"
                raise InputError(said, where=function.__qualname__, fix=FIX)
            if one is not None:
                setattr(function, name, one)
        return function

    return decorate


def refuse_unasked(function: object, kind: str) -> None:
    """Raise an InputError for checks of a function that nothing would ask.

    Args:
        kind: of the component, else the name of its decorator.
    """
    if getattr(function, "__module__", "") == __name__:  # @checks without its brackets
        raise InputError("@checks takes functions", fix=FIX)
    for name, kinds in ASKED.items():
        if hasattr(function, name) and kind not in kinds:
            what = "rows=" if name == ROWS else "check of settings"
            raise InputError(
                f"nothing asks the {what} of its @checks",
                where=getattr(function, "__qualname__", ""),
                seen=kind,
                fix=f"Those of {', '.join(kinds)} are asked; raise it in the function itself",
            )


def check_of(function: object) -> Check | None:
    """What checks the settings of a function."""
    return cast("Check | None", getattr(function, BEFORE, None))


def rows_check_of(function: object) -> Check | None:
    """What checks the rows of the data that a reward is to judge answers to."""
    return cast("Check | None", getattr(function, ROWS, None))

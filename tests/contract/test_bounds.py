"""What every plain method tells before it runs: bounds of its numbers, kinds of its rows."""

from __future__ import annotations

import math
import types
import typing

import pytest

from truing.core.bounds import Bounds, check_bounds
from truing.errors import InputError
from truing.method import Kinds, Makes, Method, methods
from truing.sources import kind_made
from truing.tables import KINDS

PLAIN = [
    name
    for name, method in methods.items()
    if method.entry.kind == "method" and method.entry.package == "truing"
    if method.verb != "serve"
]


def facts(method: Method) -> dict[str, object]:
    return typing.cast("dict[str, object]", method.declared.__dict__["__truing__"])


def numbers(method: Method) -> set[str]:
    """Names of the settings that are a number, or one of several types of which one is."""
    found: set[str] = set()
    for name, setting in method.settings.items():
        union = typing.get_origin(setting.type) in (typing.Union, types.UnionType)
        each = typing.get_args(setting.type) if union else (setting.type,)
        if {int, float} & set(each):
            found.add(name)
    return found


def below(bound: tuple[float, float | None] | str) -> float:
    """A number that the bound leaves out."""
    if isinstance(bound, str):
        low = float(bound[1:-1].split(",")[0])
        return low if bound[0] == "(" else low - 1
    return bound[0] - 1


def beyond(bound: tuple[float, float | None] | str) -> float | None:
    """A number above the bound; None where nothing is."""
    if isinstance(bound, str):
        high = float(bound[1:-1].split(",")[1])
        return None if high == float("inf") else high + (bound[-1] == "]")
    return None if bound[1] is None else bound[1] + 1


@pytest.mark.parametrize("name", PLAIN)
def test_every_number_has_bounds_that_are_kept(name: str) -> None:
    method = methods[name]
    bounds = typing.cast(Bounds, facts(method)["within"])
    assert set(bounds) == numbers(method)
    settings = {n: s.default for n, s in method.settings.items() if not s.required}
    method.check(settings, {})
    for setting, bound in bounds.items():
        for wrong in (below(bound), beyond(bound)):
            if wrong is not None:
                with pytest.raises(InputError, match=rf"^{name}: setting '{setting}' must be "):
                    method.check(settings | {setting: wrong}, {}, where=name)


@pytest.mark.parametrize("name", PLAIN)
def test_every_table_has_kinds(name: str) -> None:
    method = methods[name]
    kinds = typing.cast(Kinds, facts(method)["rows"])
    tables = {n for n, one in method.inputs.items() if one.noun == "Table"}
    # What is selected from may hold rows of any kind; other inputs say so by naming none.
    free = {"data"} - set(kinds) if method.verb == "select" else set()
    assert set(kinds) == tables - free and free <= tables


@pytest.mark.parametrize("name", PLAIN)
def test_what_is_made_is_told(name: str) -> None:
    method = methods[name]
    makes = typing.cast(Makes, facts(method)["makes"])
    if method.returns != "Table":
        assert not makes
        return
    each = {makes: {}} if isinstance(makes, str) else makes
    other: dict[str, object] = {}  # what none of the kinds before is made under
    for kind, under in each.items():
        assert kind in KINDS or method.inputs[kind].noun == "Table"
        assert set(under) <= {*method.settings, *method.inputs}
        assert kind_made(method, {**other, **under}) == kind
        other |= dict.fromkeys(under, "another")


@pytest.mark.parametrize(
    ("bound", "fits", "fails", "wanted"),
    [
        ((1, None), [1, 7], [0, -1], "at least 1"),
        ((0.0, 1.0), [0, 0.5, 1], [-0.1, 1.1], "from 0 to 1"),
        ("(0, 1]", [0.1, 1], [0, -1, 1.1], r"in \(0, 1\]"),
        ("[0, 1)", [0, 0.9], [-0.1, 1], r"in \[0, 1\)"),
        ("(0, inf)", [1e-9, 1e9], [0, -1, math.inf, math.nan], "above 0"),
        ("[0, inf)", [0, 1e9], [-1, math.inf, math.nan], "at least 0"),
        ("(-inf, inf)", [0, -1e9, 1e9], [-math.inf, math.inf, math.nan], "a finite number"),
    ],
)
def test_ends_of_bounds(
    bound: tuple[float, float | None] | str, fits: list[float], fails: list[float], wanted: str
) -> None:
    for value in fits:
        check_bounds({"x": value}, {"x": bound})
    for value in fails:
        with pytest.raises(InputError, match=f"setting 'x' must be {wanted}"):
            check_bounds({"x": value}, {"x": bound})
    check_bounds({"x": None}, {"x": bound})

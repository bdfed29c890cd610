"""Bounds of settings: between which values a number must lie, in one notation for all checks."""

from __future__ import annotations

import math
from collections.abc import Mapping

from truing.errors import InputError

# Least and largest value of settings, None where none is largest; or an interval as text, whose
# round brackets leave their ends out: "(0, 1]", "[0, inf)".
Bounds = Mapping[str, tuple[float, float | None] | str]


def check_bounds(settings: Mapping[str, object], bounds: Bounds, where: str = "") -> None:
    """Raise an InputError that names the first number outside of its bounds."""
    for name, bound in bounds.items():
        value = settings.get(name)
        wanted = _wanted(value, bound) if isinstance(value, (int, float)) else ""
        if wanted:
            raise InputError(f"setting {name!r} must be {wanted}", where=where, seen=value)


def _wanted(value: float, bound: tuple[float, float | None] | str) -> str:
    """What a number should have been; "" where it is within its bound."""
    if isinstance(bound, str):
        low, high = (float(end) for end in bound[1:-1].split(","))
        above = value > low or (value == low and bound[0] == "[")
        below = value < high or (value == high and bound[-1] == "]")
        end = "at least" if bound[0] == "[" else "above"
        said = f"{end} {low:g}" if math.isinf(high) else f"in {bound}"
        said = "a finite number" if math.isinf(low) else said
        return "" if above and below else said
    least, largest = bound
    if value >= least and (largest is None or value <= largest):
        return ""
    return f"at least {least:g}" if largest is None else f"from {least:g} to {largest:g}"

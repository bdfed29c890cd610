"""Numbers as a reader of a report wants them: units, signs, intervals, durations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

from truing.reports import Measure

if TYPE_CHECKING:
    import numpy as np

NBSP, MINUS, ARROW = "\u00a0", "\u2212", "\u2192"
NOTHING = "\u2013"
DIGITS = {"cosine": 3, "words": 1, "nats per token": 3, "seconds": 1}
GAP = "difference of shares"  # a unit: in percentage points, with a sign
FINEST = 6  # decimal places: below it there is rounding
TEXT_LIMIT = 4000  # characters of one text that a page shows


def signed(text: str) -> str:
    """A number's text with a true minus sign."""
    return text.replace("-", MINUS)


def value(number: float, unit: str = "", *, digits: int | None = None) -> str:
    """A measured value without its unit, save that a share reads as percent."""
    if not math.isfinite(number):
        return "not finite"
    if unit == "share":
        return signed(f"{100 * number:.{1 if digits is None else digits}f}{NBSP}%")
    if unit == GAP:
        return plus(number, "share")
    if unit in DIGITS or digits is not None:
        return signed(f"{number:,.{DIGITS.get(unit, 3) if digits is None else digits}f}")
    if number == int(number) and abs(number) < 1e7:
        return signed(f"{int(number):,}")
    return signed(f"{number:.4g}")


def with_unit(number: float, unit: str) -> str:
    """A measured value with its unit."""
    named = "points" if unit == GAP else unit
    return value(number, unit) + ("" if unit in ("share", "") else f"{NBSP}{named}")


def interval(measure: Measure) -> str:
    """The 95 % interval of a measure, "" when it has none."""
    if measure.lo == measure.hi:
        return ""
    return f"{value(measure.lo, measure.unit)} to {value(measure.hi, measure.unit)}"


def difference(measure: Measure) -> str:
    """A difference with its sign; of shares in percentage points."""
    points = f"{NBSP}points" if measure.unit == "share" else ""
    return plus(measure.value, measure.unit, _finer(measure)) + points


def difference_interval(measure: Measure) -> str:
    """The interval of a difference, in the unit of `difference`."""
    ends = (plus(end, measure.unit, _finer(measure)) for end in (measure.lo, measure.hi))
    return " to ".join(ends)


def decimals(width: float, least: int) -> int:
    """Decimal places, `least` or as many more, up to `FINEST`, as show so small a width."""
    places = -math.floor(math.log10(width)) if 0 < width < math.inf else least
    return max(least, min(places, FINEST))


def _finer(measure: Measure) -> int:
    """Decimal places of a difference."""
    width = measure.hi - measure.lo
    if measure.unit == "share":
        return decimals(100 * width, 1)
    return decimals(width, DIGITS.get(measure.unit, 3))


def plus(number: float, unit: str, digits: int | None = None) -> str:
    """A number with its sign; a share in percentage points, without a unit."""
    scaled = 100 * number if unit == "share" else number
    usual = 1 if unit == "share" else DIGITS.get(unit, 3)
    text = f"{scaled:+.{usual if digits is None else digits}f}"
    return signed(text if float(text) else text.lstrip("+-"))


def percent(part: float) -> str:
    """A relative change's size: whole percents above ten, below it as many places as show it."""
    size = abs(100 * part)
    return f"{size:.{0 if size >= 9.95 else decimals(size, 1)}f}{NBSP}%"


def ends_of(before: Measure, after: Measure) -> tuple[str, str]:
    """Two shares in whole percents, or as many places as tell them apart."""
    both = (before.value, after.value)
    told = [tuple(value(v, "share", digits=digits) for v in both) for digits in range(4)]
    first, second = next((t for t in told if t[0] != t[1]), told[0])
    return first, second


def ticks(numbers: Sequence[float], unit: str) -> list[str]:
    """Labels of an axis, with the places that all of `numbers` need."""
    scale = 2 if unit == "share" else 0
    places = (d for d in range(16) if all(round(n, d + scale) == n for n in numbers))
    digits = next(places, 16)
    return [value(n, unit, digits=digits) for n in numbers]


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if not math.isfinite(seconds) or seconds < 0:
        return NOTHING
    if seconds < 0.05:
        return f"under 0.1{NBSP}s"
    if seconds < 9.95:
        return f"{seconds:.1f}{NBSP}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}{NBSP}s"
    if whole < 3600:
        return f"{whole // 60}{NBSP}min {whole % 60:02d}{NBSP}s"
    return f"{whole // 3600}{NBSP}h {whole % 3600 // 60:02d}{NBSP}min"


def count(n: int, what: str) -> str:
    """A number of things: "1 step", "2 steps"."""
    return f"{n:,} {what}" + ("" if n == 1 else "s")


def cut(text: str, limit: int = TEXT_LIMIT) -> str:
    """A text for the page; what was left out is said."""
    if len(text) <= limit:
        return text
    return f"{text[:limit].rstrip()} \u2026 [cut here: {len(text):,} characters in all]"


def excerpt(text: str, limit: int = 90) -> str:
    """One line of a text."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1].rstrip() + "\u2026"


def shown(thing: object) -> str:
    """Any cell of a table as text: messages as a dialogue, arrays by their shape."""
    if thing is None:
        return ""
    if isinstance(thing, bool):
        return "yes" if thing else "no"
    if isinstance(thing, float):
        return value(thing)
    if hasattr(thing, "shape") and hasattr(thing, "dtype"):
        array = cast("np.ndarray", thing)
        return f"array of {array.dtype}, {list(array.shape)}"
    if isinstance(thing, Mapping):
        items = cast("Mapping[object, object]", thing).items()
        return ", ".join(f"{k}: {shown(v) or 'none'}" for k, v in items)
    if isinstance(thing, Sequence) and not isinstance(thing, str):
        return _listed(cast("Sequence[object]", thing))
    return str(thing)


def _listed(items: Sequence[object]) -> str:
    messages = [cast("Mapping[str, object]", m) for m in items if isinstance(m, Mapping)]
    if (
        messages
        and len(messages) == len(items)
        and all({"role", "content"} <= set(m) for m in messages)
    ):
        if len(messages) == 1 and messages[0]["role"] == "user":
            return str(messages[0]["content"])
        return "\n\n".join(f"{m['role']}: {m['content']}" for m in messages)
    texts = [shown(i) for i in items]
    return ("\n\n" if any(len(t) > 60 for t in texts) else ", ").join(texts)

"""Methods side by side: gain against side effect against cost, as one picture and its table.

Each method is a numbered disc: further right is more gain, lower is less loss of general ability,
a larger disc took longer; where times are not known, all are alike. The number of a disc that
others cover stands beside it, at the end of a line. Bands are 95 % intervals over seeds; the table
carries the names.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from markupsafe import Markup

from truing.report.outcome import find
from truing.report.svg import Scale, tag
from truing.report.wording import duration, signed
from truing.reports import Measure, Report

HEIGHT = 340
SMALLEST, LARGEST = 9.0, 20.0  # radius of a disc in pixels
# Numbers are kept apart in a picture of the least width (`.scatter` of the style); in a wider one,
# where places across are shares of the width, they only come further apart.
NARROW = 520
NUMBER = (18.0, 14.0)  # pixels that a number takes, across and up
SIDEWAYS = 3  # how much further a place to the side is than one above: it moves away with the width


@dataclass(frozen=True)
class Contender:
    """One method of a comparison, numbered from the largest gain."""

    number: int
    name: str
    gain: Measure
    side_effect: Measure
    seconds: Measure | None = None
    over: str | None = None  # gain over the first method named, seed by seed; None: no such column

    def texts(self) -> tuple[str, ...]:
        """Gain and side effect with intervals, gain over the first, cost if known."""
        gain, side = self.gain, self.side_effect
        return (
            _points(gain.value),
            f"{_points(gain.lo)} to {_points(gain.hi)}" if gain.n > 1 else "one seed",
            _nats(side.value),
            f"{_nats(side.lo)} to {_nats(side.hi)}" if side.n > 1 else "one seed",
            *([] if self.over is None else [self.over]),
            *([duration(self.seconds.value)] if self.seconds else []),
        )


@dataclass(frozen=True)
class Compared:
    """A comparison as the page shows it."""

    step: str
    seeds: str
    contenders: list[Contender]
    chart: Markup
    left_out: dict[str, str]  # methods of a group that need more than the data has, with the reason
    first: str = ""  # the method that the others are compared with, seed by seed
    overlap: bool = False  # the samples of the seeds share rows
    held_out: str = ""  # how many pairs all are measured on

    @property
    def timed(self) -> bool:
        """True where it is known what each of them took."""
        return all(c.seconds for c in self.contenders)

    @property
    def headline(self) -> str:
        """The largest gain, and what it cost; no name where none is clear, or several are alike."""
        best, n = self.contenders[0], len(self.contenders)
        gain, span, side, *_ = best.texts()
        points = f"{gain} points of preference on held-out pairs"
        if all(c.gain.lo <= 0 for c in self.contenders):
            if n == 1:
                return f"{best.name} did not clearly gain: {points}."
            return f"None of {n} methods clearly gained: {points} at best."
        alike = sum(c.texts()[0] == gain for c in self.contenders)
        if alike > 1:
            return f"{alike} of {n} methods gained most: {points} each."
        many = f"Of {n} methods, " if n > 1 else ""
        over = f" (95 % interval {span})" if best.gain.n > 1 else ""
        cost = f"{side} nats per token of general ability"
        return f"{many}{best.name} gained most: {points}{over}, at {cost}."


def is_comparison(report: Report) -> bool:
    """True for what `truing compare` reports."""
    return report.meta.get("kind") == "comparison"


def _points(share: float) -> str:
    return signed(f"{100 * share:+.1f}")


def _nats(value: float) -> str:
    return signed(f"{value:+.4f}")


def _side_effect(report: Report, category: str) -> Measure:
    found = find(report, "side effect", category)
    assert found is not None, category  # `truing compare` writes it for each
    return found


def _bands(one: Contender, x: Scale, y: Scale) -> list[Markup]:
    up = [round(HEIGHT * (1 - y.at(v) / 100), 1) for v in (one.side_effect.lo, one.side_effect.hi)]
    middle = round(HEIGHT * (1 - y.at(one.side_effect.value) / 100), 1)
    across = [f"{x.at(v)}%" for v in (one.gain.lo, one.gain.hi)]
    at = f"{x.at(one.gain.value)}%"
    return [
        tag("line", x1=across[0], x2=across[1], y1=middle, y2=middle, class_="whisker"),
        tag("line", x1=at, x2=at, y1=up[0], y2=up[1], class_="whisker"),
    ]


@dataclass(frozen=True)
class _Box:
    """A rectangle around a place, in pixels of the narrow picture."""

    x: float
    y: float
    width: float
    height: float

    def meets(self, others: Iterable[_Box]) -> bool:
        """True when it overlaps one of `others`."""
        return any(
            abs(self.x - o.x) < (self.width + o.width) / 2
            and abs(self.y - o.y) < (self.height + o.height) / 2
            for o in others
        )


@functools.cache
def _ways() -> list[tuple[float, float]]:
    """Where a number may go from its disc, the nearest first."""
    width, height = NUMBER
    across = [width / 2 * i for i in range(-2 * NARROW // int(width), 2 * NARROW // int(width) + 1)]
    up = [height / 2 * i for i in range(-2 * HEIGHT // int(height), 2 * HEIGHT // int(height) + 1)]
    return sorted(
        ((x, y) for x in across for y in up), key=lambda p: math.hypot(SIDEWAYS * p[0], p[1])
    )


def _beside(disc: _Box, discs: Sequence[_Box], taken: Sequence[_Box]) -> _Box:
    """The nearest place for a disc's number on no disc and no other number, or else on a disc."""
    width, height = NUMBER
    places = [
        _Box(disc.x + x, disc.y + y, width, height)
        for x, y in _ways()
        if width / 2 <= disc.x + x <= NARROW - width / 2
        and height / 2 <= disc.y + y <= HEIGHT - height / 2
    ]
    for others in ([*taken, *discs], taken):
        if found := next((p for p in places if not p.meets(others)), None):
            return found
    return places[0]


def _numbers(discs: Sequence[_Box]) -> list[_Box]:
    """Where the number of each disc stands: on it, or beside it where others cover that place."""
    made = {
        i: place
        for i, d in enumerate(discs)
        if not (place := _Box(d.x, d.y, *NUMBER)).meets([*discs[:i], *discs[i + 1 :]])
    }
    for i, d in enumerate(discs):
        if i not in made:
            made[i] = _beside(d, discs, list(made.values()))
    return [made[i] for i in range(len(discs))]


def _sized(contenders: Sequence[Contender], x: Scale, y: Scale) -> list[_Box]:
    """The disc of each, its area growing with what the method took."""
    seconds = [c.seconds.value if c.seconds else 0.0 for c in contenders]
    made: list[_Box] = []
    for one, took in zip(contenders, seconds, strict=True):
        radius = SMALLEST + (LARGEST - SMALLEST) * math.sqrt(took / (max(seconds) or 1.0))
        up = HEIGHT * (1 - y.at(one.side_effect.value) / 100)
        made.append(_Box(NARROW * x.at(one.gain.value) / 100, up, 2 * radius, 2 * radius))
    return made


def _across(box: _Box) -> str:
    return f"{round(100 * box.x / NARROW, 2)}%"


def _disc(one: Contender, disc: _Box, covered: bool) -> Markup:
    gain, _, side, _, *took = one.texts()
    said = ", ".join([f"{one.name}: gain {gain} points", f"side effect {side}", *took])
    radius, height = round(disc.width / 2, 1), round(disc.y, 1)
    kind = "disc covered" if covered else "disc"
    return tag(
        "g",
        tag("title", said),
        tag("circle", cx=_across(disc), cy=height, r=radius, class_=kind),
    )


def _number(one: Contender, disc: _Box, place: _Box) -> list[Markup]:
    """The number, and the line that leads to it where it does not stand on its disc."""
    moved = (place.x, place.y) != (disc.x, disc.y)
    kind, height = "number moved" if moved else "number", round(place.y, 1)
    text = tag(
        "text", str(one.number), x=_across(place), y=height + 4, text_anchor="middle", class_=kind
    )
    line = tag(
        "line", x1=_across(disc), x2=_across(place), y1=round(disc.y, 1), y2=height, class_="leader"
    )
    return [line, text] if moved else [text]


def _scale(measures: Sequence[Measure]) -> Scale:
    """Round axis that holds all values, and as much of their intervals as does not flatten them."""
    values = [m.value for m in measures] + [0.0]
    spread = (max(values) - min(values)) or 1e-3
    ends = [
        min(max(end, min(values) - spread), max(values) + spread)
        for m in measures
        for end in (m.lo, m.hi)
    ]
    return Scale.around([*values, *ends])


def picture(contenders: Sequence[Contender]) -> Markup:
    """The scatter plot; both axes hold zero, which is the model before."""
    x = _scale([c.gain for c in contenders])
    y = _scale([c.side_effect for c in contenders])
    marks: list[Markup] = []
    for tick in x.ticks:
        at = f"{x.at(tick)}%"
        kind = "grid zero" if tick == 0 else "grid"
        marks.append(tag("line", x1=at, x2=at, y1=0, y2=HEIGHT, class_=kind))
        text = signed(f"{100 * tick:+g}") if tick else "0"
        marks.append(tag("text", text, x=at, y=HEIGHT + 17, text_anchor="middle", class_="tick"))
    for tick in y.ticks:
        at = round(HEIGHT * (1 - y.at(tick) / 100), 1)
        kind = "grid zero" if tick == 0 else "grid"
        marks.append(tag("line", x1=0, x2="100%", y1=at, y2=at, class_=kind))
        text = signed(f"{tick:+g}") if tick else "0"
        marks.append(tag("text", text, x=-8, y=at + 4, text_anchor="end", class_="tick"))
    for one in contenders:
        marks += _bands(one, x, y)
    discs = _sized(contenders, x, y)
    drawn = list(zip(contenders, discs, _numbers(discs), strict=True))
    # Large discs first, so that none hides a small one.
    for one, disc, place in sorted(drawn, key=lambda d: -d[1].width):
        marks.append(_disc(one, disc, (place.x, place.y) != (disc.x, disc.y)))
    # Numbers over all lines, since a line may pass under one.
    leads = [_number(*d) for d in drawn]
    marks += [m for marks_of in leads for m in marks_of[:-1]] + [m[-1] for m in leads]
    return tag(
        "svg",
        *marks,
        class_="plot scatter",
        width="100%",
        height=HEIGHT + 22,
        role="img",
        aria_label="Gain against side effect of each method",
    )


def _over(report: Report, name: str, first: str) -> str | None:
    """How much more a method gained than the first, in points; None where that is not told."""
    if not first:
        return None
    m = find(report, "gain over first", name)
    if m is None:
        return ""
    interval = f" ({_points(m.lo)} to {_points(m.hi)})" if m.n > 1 else ""
    return f"{_points(m.value)}{interval}"


def compared(step: str, report: Report) -> Compared:
    """A comparison's report for the page, the largest gain first."""
    gains = sorted((m for m in report if m.name == "gain"), key=lambda m: -m.value)
    first = str(report.meta.get("first", "")) if len(gains) > 1 else ""
    found = [
        Contender(
            i,
            gain.category,
            gain,
            _side_effect(report, gain.category),
            find(report, "seconds", gain.category),
            _over(report, gain.category, first),
        )
        for i, gain in enumerate(gains, 1)
    ]
    seeds = str(report.meta.get("seeds", 1))
    left = cast("Mapping[str, str]", report.meta.get("left_out") or {})
    overlap, held_out = report.meta.get("overlap") is True, str(report.meta.get("held_out", ""))
    return Compared(step, seeds, found, picture(found), dict(left), first, overlap, held_out)

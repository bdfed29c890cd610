"""Methods side by side: gain against side effect against cost, as one picture and its table.

Each method is a numbered disc: further right is more gain, lower is less loss of general ability,
a larger disc took longer. Bands are 95 % intervals over seeds; the table carries the names.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from truing.report.outcome import find
from truing.report.svg import Scale, tag
from truing.report.wording import duration, signed
from truing.reports import Measure, Report

HEIGHT = 340
SMALLEST, LARGEST = 9.0, 20.0  # radius of a disc in pixels


@dataclass(frozen=True)
class Contender:
    """One method of a comparison, numbered from the largest gain."""

    number: int
    name: str
    gain: Measure
    side_effect: Measure
    seconds: Measure

    def texts(self) -> tuple[str, str, str, str, str]:
        """Gain, its interval, side effect, its interval, cost: as the table shows them."""
        gain, side = self.gain, self.side_effect
        return (
            _points(gain.value),
            f"{_points(gain.lo)} to {_points(gain.hi)}" if gain.lo < gain.hi else "one seed",
            _nats(side.value),
            f"{_nats(side.lo)} to {_nats(side.hi)}" if side.lo < side.hi else "one seed",
            duration(self.seconds.value),
        )


@dataclass(frozen=True)
class Compared:
    """A comparison as the page shows it."""

    step: str
    seeds: str
    contenders: list[Contender]
    chart: Markup

    @property
    def headline(self) -> str:
        """The largest gain, and what it cost."""
        best = self.contenders[0]
        gain, _, side, _, _ = best.texts()
        many = f"Of {len(self.contenders)} methods, " if len(self.contenders) > 1 else ""
        return (
            f"{many}{best.name} gained most: {gain} points of preference on held-out pairs, at "
            f"{side} nats per token of general ability."
        )


def is_comparison(report: Report) -> bool:
    """True for what `truing compare` reports."""
    return report.meta.get("kind") == "comparison"


def _points(share: float) -> str:
    return signed(f"{100 * share:+.1f}")


def _nats(value: float) -> str:
    return signed(f"{value:+.4f}")


def _needed(report: Report, name: str, category: str) -> Measure:
    found = find(report, name, category)
    assert found is not None, (name, category)  # `truing compare` writes all of them
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


def _disc(one: Contender, x: Scale, y: Scale, most: float) -> Markup:
    share = math.sqrt(one.seconds.value / most) if most else 0.0
    radius = round(SMALLEST + (LARGEST - SMALLEST) * share, 1)
    height = round(HEIGHT * (1 - y.at(one.side_effect.value) / 100), 1)
    at = f"{x.at(one.gain.value)}%"
    said = (
        f"{one.name}: gain {one.texts()[0]} points, side effect {one.texts()[2]}, {one.texts()[4]}"
    )
    return tag(
        "g",
        tag("title", said),
        tag("circle", cx=at, cy=height, r=radius, class_="disc"),
        tag("text", str(one.number), x=at, y=height + 4, text_anchor="middle", class_="number"),
    )


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
    most = max(c.seconds.value for c in contenders)
    # Large discs first, so that none hides a small one.
    for one in sorted(contenders, key=lambda c: -c.seconds.value):
        marks.append(_disc(one, x, y, most))
    return tag("svg", *marks, class_="plot scatter", width="100%", height=HEIGHT + 22,
               role="img", aria_label="Gain against side effect of each method")  # fmt: skip


def compared(step: str, report: Report) -> Compared:
    """A comparison's report for the page, the largest gain first."""
    gains = sorted((m for m in report if m.name == "gain"), key=lambda m: -m.value)
    found = [
        Contender(
            i,
            gain.category,
            gain,
            _needed(report, "side effect", gain.category),
            _needed(report, "seconds", gain.category),
        )
        for i, gain in enumerate(gains, 1)
    ]
    seeds = str(report.meta.get("seeds", 1))
    return Compared(step, seeds, found, picture(found))

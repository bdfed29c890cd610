"""Small charts as SVG text: intervals before and after, bars, curves.

Positions along the x axis are percentages, so that a chart takes any width while its text keeps
its size; colours are classes of the page's style sheet, which knows light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate

from markupsafe import Markup, escape

from truing.reports import Measure

Points = Sequence[tuple[float, float]]
LANES = (13, 31)  # y of before and after
ROW_HEIGHT = 44
CURVE_HEIGHT = 132
HITS = 160  # curves with more points have no tooltips of their own
SMOOTH = 40  # from so many points on, running means are drawn over the values


def tag(name: str, *children: str, **attributes: object) -> Markup:
    """An element; children that are no Markup and all attributes are escaped."""
    fields = "".join(
        f' {k.rstrip("_").replace("_", "-")}="{escape(str(v))}"'
        for k, v in attributes.items()
        if v is not None
    )
    inner = "".join(str(escape(c)) for c in children)
    return Markup(f"<{name}{fields}>{inner}</{name}>")


@dataclass(frozen=True)
class Scale:
    """A linear axis from `lo` to `hi` with round `ticks` inside."""

    lo: float
    hi: float
    ticks: tuple[float, ...]

    @classmethod
    def shares(cls) -> Scale:
        """From 0 to 100 %: shares are never drawn larger than they are."""
        return cls(0.0, 1.0, (0.0, 0.25, 0.5, 0.75, 1.0))

    @classmethod
    def around(cls, values: Iterable[float], ticks: int = 4) -> Scale:
        """A round axis that holds all finite `values`."""
        finite = [v for v in values if math.isfinite(v)] or [0.0, 1.0]
        lo, hi = min(finite), max(finite)
        if hi - lo <= 1e-9 * max(abs(lo), abs(hi)):  # alike but for rounding
            pad = abs(lo) * 0.1 or 1.0
            lo, hi = lo - pad, hi + pad
        step = _round_step((hi - lo) / ticks)
        first, last = math.floor(lo / step + 1e-9), math.ceil(hi / step - 1e-9)
        made = tuple(float(f"{i * step:.12g}") for i in range(first, last + 1))
        return cls(made[0], made[-1], made)

    def at(self, value: float) -> float:
        """Position of a value in percent, kept on the axis."""
        if not math.isfinite(value):
            value = self.lo if value < 0 else self.hi
        return round(100 * min(max((value - self.lo) / (self.hi - self.lo), 0.0), 1.0), 2)


def _round_step(raw: float) -> float:
    power = 10.0 ** math.floor(math.log10(raw))
    return next(m * power for m in (1.0, 2.0, 2.5, 5.0, 10.0) if m * power >= raw * 0.999)


def _grid(scale: Scale, height: float) -> list[Markup]:
    return [
        tag("line", x1=f"{scale.at(t)}%", x2=f"{scale.at(t)}%", y1=0, y2=height, class_="grid")
        for t in scale.ticks
    ]


def _lane(measure: Measure, scale: Scale, y: int, when: str, label: str) -> list[Markup]:
    band = tag(
        "line",
        x1=f"{scale.at(measure.lo)}%",
        x2=f"{scale.at(measure.hi)}%",
        y1=y,
        y2=y,
        class_=f"band {when}",
    )
    dot = tag(
        "circle",
        tag("title", label),
        cx=f"{scale.at(measure.value)}%",
        cy=y,
        r=6,
        class_=f"dot {when}",
    )
    return [band, dot]


def dumbbell(
    before: Measure, after: Measure, scale: Scale, label: str, notes: tuple[str, str]
) -> Markup:
    """Before above after on one axis, each with its interval; `notes` are the dots' tooltips."""
    link = tag(
        "line",
        x1=f"{scale.at(before.value)}%",
        x2=f"{scale.at(after.value)}%",
        y1=LANES[0],
        y2=LANES[1],
        class_="link",
    )
    marks = [
        *_grid(scale, ROW_HEIGHT),
        link,
        *_lane(before, scale, LANES[0], "before", notes[0]),
        *_lane(after, scale, LANES[1], "after", notes[1]),
    ]
    return tag(
        "svg", *marks, class_="plot", width="100%", height=ROW_HEIGHT, role="img", aria_label=label
    )


def single(measure: Measure, scale: Scale, label: str) -> Markup:
    """One value with its interval."""
    marks = [*_grid(scale, 26), *_lane(measure, scale, 13, "after", label)]
    return tag("svg", *marks, class_="plot", width="100%", height=26, role="img", aria_label=label)


def axis(scale: Scale, labels: Sequence[str]) -> Markup:
    """The tick labels under rows of one scale; those at the ends are kept inside."""
    texts: list[Markup] = []
    for tick, label in zip(scale.ticks, labels, strict=True):
        place = scale.at(tick)
        anchor = "start" if place == 0 else "end" if place == 100 else "middle"
        texts.append(tag("text", label, x=f"{place}%", y=13, text_anchor=anchor, class_="tick"))
    return tag("svg", *texts, class_="plot axis", width="100%", height=18, aria_hidden="true")


def bar(share: float, *, hollow: bool, label: str) -> Markup:
    """A horizontal bar over `share` of the width."""
    width = round(100 * min(max(share, 0.0), 1.0), 2)
    kind = "bar hollow" if hollow else "bar"
    marks = [tag("rect", x=0, y=3, width="100%", height=12, rx=3, class_="track")]
    if share > 0:
        marks.append(
            tag("rect", x=0, y=3, width=f"{max(width, 0.4)}%", height=12, rx=3, class_=kind)
        )
    return tag("svg", *marks, class_="plot", width="100%", height=18, role="img", aria_label=label)


def stacked(counts: Mapping[str, int], label: str, said: Mapping[str, str]) -> Markup:
    """A bar divided by counts; each part has the class of its name and is `said` in its tooltip."""
    total = sum(counts.values()) or 1
    parts: list[Markup] = []
    x = 0.0
    for name, n in counts.items():
        width = 100 * n / total
        if n:
            note = tag("title", f"{n} {said[name]}")
            parts.append(
                tag(
                    "rect",
                    note,
                    x=f"{x:.2f}%",
                    y=4,
                    width=f"{width:.2f}%",
                    height=16,
                    class_=f"part {name}",
                )
            )
        if width > 4:
            middle = f"{x + width / 2:.2f}%"
            parts.append(
                tag("text", str(n), x=middle, y=16.5, text_anchor="middle", class_=f"in {name}")
            )
        x += width
    return tag("svg", *parts, class_="plot", width="100%", height=24, role="img", aria_label=label)


def smoothed(points: Points) -> list[tuple[float, float]]:
    """Means over a window of a tenth of all points, narrower at the ends; gaps stay gaps."""
    half = len(points) // 20
    known = [math.isfinite(v) for _, v in points]
    # Exact sums: a spike of 1e20 would wipe out what comes behind it.
    values = (Fraction(v) if ok else Fraction(0) for (_, v), ok in zip(points, known, strict=True))
    sums = [Fraction(0), *accumulate(values)]
    counts = [0, *accumulate(known)]
    made: list[tuple[float, float]] = []
    for i, (x, _) in enumerate(points):
        reach = min(half, i, len(points) - 1 - i)
        first, end = i - reach, i + reach + 1
        there = counts[end] - counts[first]
        mean = float((sums[end] - sums[first]) / there) if known[i] else math.nan
        made.append((x, mean))
    return made


def thinned(points: Points, limit: int = 400) -> list[tuple[float, float]]:
    """At most about `limit` points: of each run of neighbours its lowest, highest and a gap."""
    items = list(points)
    if len(items) <= limit:
        return items
    size = math.ceil(2 * len(items) / limit)
    kept: list[tuple[float, float]] = []
    for start in range(0, len(items), size):
        part = items[start : start + size]
        by_value = sorted((p for p in part if math.isfinite(p[1])), key=lambda p: p[1])
        gaps = [p for p in part if not math.isfinite(p[1])]
        kept += sorted({*by_value[:1], *by_value[-1:], *gaps[:1]})
    if kept[-1] != items[-1]:
        kept.append(items[-1])
    return kept


def _path(points: Points, across: Scale, up: Scale) -> str:
    parts: list[str] = []
    pen = "M"
    for x, y in points:
        if math.isfinite(y):
            parts.append(f"{pen}{across.at(x)} {round(100 - up.at(y), 2)}")
            pen = "L"
        else:
            pen = "M"
    return " ".join(parts)


def _line(points: Points, across: Scale, up: Scale, kind: str) -> Markup:
    return tag("path", d=_path(points, across, up), class_=kind, vector_effect="non-scaling-stroke")


def _spots(
    points: Points, across: Scale, up: Scale, name_of: str, kind: str = "spot", last: str = "spot"
) -> list[Markup]:
    """A dot with a tooltip for each finite value, of class `last` for the last one."""
    return [
        tag(
            "circle",
            tag("title", f"step {x:g}: {name_of} {y:.5g}"),
            cx=f"{across.at(x)}%",
            cy=round(CURVE_HEIGHT * (1 - up.at(y) / 100), 1),
            r=4,
            class_=last if (x, y) == tuple(points[-1]) else kind,
        )
        for x, y in points
        if math.isfinite(y)
    ]


def _ends(across: Scale, first: float, end: float) -> list[Markup]:
    """Labels of the first and the last step; one label for one update."""
    return [
        tag(
            "text",
            f"step {place:g}" if anchor == "start" else f"{place:g}",
            x=f"{across.at(place)}%",
            y=CURVE_HEIGHT + 17,
            text_anchor=anchor,
            class_="tick",
        )
        for place, anchor in {end: "end", first: "start"}.items()
    ]


def curve(
    points: Points,
    label: str,
    name_of: str,
    ticks: Sequence[str],
    up: Scale,
    *,
    smooth: bool,
    held: Points = (),
) -> Markup:
    """A line over training steps with its y axis; gaps where a value is not finite.

    Args:
        points: (step, value), rising.
        label: what a screen reader says.
        name_of: of the value, for tooltips.
        ticks: labels of `up.ticks`.
        smooth: draw running means over the values, where there are many.
        held: (step, value) on held-out rows, rising: a second line, of dots.
    """
    steps = [x for x, _ in (*points, *held)]
    first, end = min(steps), max(steps)
    across = Scale(first, max(end, first + 1), ())
    marks: list[Markup] = []
    for tick, text in zip(up.ticks, ticks, strict=True):
        y = round(CURVE_HEIGHT * (1 - up.at(tick) / 100), 1)
        marks.append(tag("line", x1=0, x2="100%", y1=y, y2=y, class_="grid"))
        marks.append(tag("text", text, x=-8, y=y + 4, text_anchor="end", class_="tick"))
    smooth = smooth and len(points) >= SMOOTH
    raw = "line faint" if smooth else "line"
    lines = [_line(thinned(points), across, up, raw)]
    if smooth:
        lines.append(_line(thinned(smoothed(points)), across, up, "line"))
    if held:
        lines.append(_line(held, across, up, "line held"))
    marks.append(
        tag(
            "svg",
            *lines,
            x=0,
            y=0,
            width="100%",
            height=CURVE_HEIGHT,
            viewBox="0 0 100 100",
            preserveAspectRatio="none",
            overflow="visible",
        )
    )
    shown = points if len(points) <= HITS else points[-1:]
    marks += _spots(shown, across, up, name_of, "hit", "hit last")
    marks += _spots(held, across, up, f"held-out {name_of}")
    marks += _ends(across, first, end)
    return tag(
        "svg",
        *marks,
        class_="plot curve",
        width="100%",
        height=CURVE_HEIGHT + 22,
        role="img",
        aria_label=label,
    )

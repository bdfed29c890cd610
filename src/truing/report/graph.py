"""The pipeline as a picture: layers of steps on a wide page, a line of steps on a narrow one."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from truing.report.facts import RunFacts, StepFacts
from truing.report.layout import HEIGHT, NARROW, Layout, Point, lay_out
from truing.report.svg import tag
from truing.report.wording import duration

WIDEST = 1400  # a wide page has 1150 pixels; a graph that must shrink further is drawn as a line
LINE_ROW = 54
LINE_X = 62
SIGNS = {"done": "\u2713", "failed": "\u2715", "stopped": "\u25a0", "running": "\u25b6"}
PENDING = "\u25cb"


def fitted(text: str, pixels: float, size: float) -> str:
    """`text` cut so that it takes at most `pixels` in any common sans-serif of `size`."""
    room = int(pixels / (0.6 * size))
    return text if len(text) <= room else text[: max(1, room - 1)] + "\u2026"


def state(step: StepFacts) -> str:
    """What became of a step, in words: "done, cached", "failed", "12 s"."""
    if step.status != "done":
        return step.status
    return "cached" if step.cached else duration(step.seconds)


def _about(step: StepFacts) -> str:
    return ", ".join(filter(None, [step.method, step.about, state(step)]))


def _title(step: StepFacts) -> Markup:
    parts = [f"{step.name}: {_about(step)}", step.summary, step.error]
    return tag("title", "\n".join(filter(None, parts)))


def _node(step: StepFacts, place: Point, width: float, target: str) -> Markup:
    left, top = place[0] - width / 2, place[1] - HEIGHT / 2
    cached = " cached" if step.cached else ""
    box = tag("rect", x=left, y=top, width=width, height=HEIGHT, rx=7, class_=f"node{cached}")
    stripe = tag(
        "path",
        d=f"M{left + 7} {top}h-1a6 6 0 0 0-6 6v{HEIGHT - 12}a6 6 0 0 0 6 6h1z",
        class_="stripe",
    )
    sign = tag(
        "text",
        SIGNS.get(step.status, PENDING),
        x=left + width - 12,
        y=top + 19,
        text_anchor="end",
        class_="sign",
    )
    room = width - 34 - 7 * len(state(step))
    lines = [
        tag("text", fitted(step.name, width - 44, 13), x=left + 16, y=top + 19, class_="name"),
        tag("text", fitted(step.method, width - 26, 11), x=left + 16, y=top + 34, class_="soft"),
        tag("text", fitted(step.about, room, 11), x=left + 16, y=top + 49, class_="soft"),
        tag("text", state(step), x=left + width - 12, y=top + 49, text_anchor="end", class_="time"),
    ]
    return tag(
        "a",
        _title(step),
        box,
        stripe,
        sign,
        *lines,
        href=f"#{target}",
        class_=f"step {step.status}",
    )


def _bent(points: Sequence[Point]) -> str:
    """A smooth way through the points, upright where it leaves and arrives."""
    x, y = points[0][0], points[0][1] + HEIGHT / 2
    parts = [f"M{x} {y}"]
    for i, (to_x, to_y) in enumerate(points[1:], 1):
        end = to_y - HEIGHT / 2 - (5 if i == len(points) - 1 else 0)
        half = (end - y) / 2
        parts.append(f"C{x} {y + half} {to_x} {end - half} {to_x} {end}")
        x, y = to_x, end
        if i < len(points) - 1:
            y = to_y + HEIGHT / 2
            parts.append(f"L{x} {y}")
    return " ".join(parts)


def _arrow(tip: Point) -> str:
    x, y = tip[0], tip[1] - HEIGHT / 2
    return f"M{x - 4} {y - 7}L{x} {y}L{x + 4} {y - 7}Z"


def _layered(run: RunFacts, layout: Layout, targets: dict[str, str]) -> Markup:
    edges = [tag("path", d=_bent(points), class_="edge") for points in layout.edges.values()]
    tips = {points[-1] for points in layout.edges.values()}
    arrows = [tag("path", d=_arrow(tip), class_="arrow") for tip in sorted(tips)]
    nodes = [_node(s, layout.nodes[n], layout.box, targets[n]) for n, s in run.steps.items()]
    return tag(
        "svg",
        *edges,
        *arrows,
        *nodes,
        class_="graph layered",
        viewBox=f"-2 -2 {layout.width + 4} {layout.height + 4}",
        width=layout.width + 4,
        height=layout.height + 4,
        role="group",
        aria_label=label(run),
    )


def _line(run: RunFacts, targets: dict[str, str], always: bool) -> Markup:
    """Steps under each other, their edges as arcs in the margin."""
    place = {name: i * LINE_ROW + LINE_ROW / 2 for i, name in enumerate(run.steps)}
    longest = max([LINE_ROW * 6.0, *(place[b] - place[a] for a, b in run.edges())])
    arcs: list[Markup] = []
    for a, b in run.edges():
        if place[a] < place[b]:
            bow = LINE_X - 8 - 62 * math.sqrt((place[b] - place[a]) / longest)
            way = f"M{LINE_X} {place[a]}C{bow} {place[a]} {bow} {place[b]} {LINE_X} {place[b]}"
            arcs.append(tag("path", d=way, class_="edge"))
    rows: list[Markup] = []
    for name, step in run.steps.items():
        y = place[name]
        rows.append(
            tag(
                "a",
                _title(step),
                tag(
                    "rect",
                    x=LINE_X - 14,
                    y=y - LINE_ROW / 2 + 3,
                    width="100%",
                    height=LINE_ROW - 6,
                    class_="area",
                ),
                tag("circle", cx=LINE_X, cy=y, r=9, class_="knot"),
                tag(
                    "text",
                    SIGNS.get(step.status, PENDING),
                    x=LINE_X,
                    y=y + 4,
                    text_anchor="middle",
                    class_="sign",
                ),
                tag("text", fitted(name, 190, 13), x=LINE_X + 20, y=y - 3, class_="name"),
                tag("text", fitted(step.method, 200, 11), x=LINE_X + 20, y=y + 13, class_="soft"),
                tag("text", state(step), x="100%", y=y - 3, text_anchor="end", class_="time"),
                href=f"#{targets[name]}",
                class_=f"step {step.status}",
            )
        )
    return tag(
        "svg",
        *arcs,
        *rows,
        class_="graph rail" + (" always" if always else ""),
        width="100%",
        height=len(run.steps) * LINE_ROW,
        role="group",
        aria_label=label(run),
    )


def label(run: RunFacts) -> str:
    """What a screen reader says of the picture."""
    return f"Pipeline of {len(run.steps)} steps; {run.done()} done"


def picture(run: RunFacts, targets: dict[str, str]) -> Markup:
    """Both drawings; the style sheet shows the one that fits.

    Args:
        run: its steps in topological order.
        targets: step -> id of the element that says more about it.
    """
    if not run.steps:
        return Markup("")
    layout = lay_out(list(run.steps), run.edges())
    if layout.width > WIDEST:
        layout = lay_out(list(run.steps), run.edges(), NARROW)
    if layout.width > WIDEST:
        return _line(run, targets, always=True)
    return _layered(run, layout, targets) + _line(run, targets, always=False)

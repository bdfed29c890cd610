"""Runs that compare nothing: every measure as a row, and a headline from what there is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from markupsafe import Markup

from truing.report import svg
from truing.report.facts import RunFacts, StepFacts
from truing.report.wording import ARROW, count, excerpt, interval, with_unit
from truing.reports import Measure, Report
from truing.summary import leading


@dataclass(frozen=True)
class Line:
    """One measure of any report, as a row of a table."""

    measure: Measure
    name: str
    text: str
    interval: str
    chart: Markup


def lines(report: Report) -> list[Line]:
    """Every measure of a report; shares drawn on one axis, others only written."""
    made: list[Line] = []
    for m in report:
        name = f"{m.name} {ARROW} {m.category}" if m.category else m.name
        span = interval(m)
        said = f"{name}: {with_unit(m.value, m.unit)}" + (f" ({span})" if span else "")
        drawable = m.unit == "share" and 0 <= m.lo <= m.hi <= 1
        chart = svg.single(m, svg.Scale.shares(), said) if drawable else Markup("")
        made.append(Line(m, name, with_unit(m.value, m.unit), span, chart))
    return made


def _trained(curves: Mapping[str, Sequence[Mapping[str, object]]]) -> str:
    for step, rows in reversed(list(curves.items())):
        losses = [r["loss"] for r in rows if isinstance(r.get("loss"), (int, float))]
        numbers = [float(cast("float", v)) for v in losses]
        if len(numbers) > 1 and all(map(math.isfinite, (numbers[0], numbers[-1]))):
            way = f"the loss went from {numbers[0]:.3g} to {numbers[-1]:.3g}"
            return f"{step}: {way} in {count(len(numbers), 'update')}."
    return ""


def broken_step(run: RunFacts) -> StepFacts | None:
    """The first step that failed or stopped."""
    return next((s for s in run.steps.values() if s.status in ("failed", "stopped")), None)


def plain_headline(
    run: RunFacts,
    reports: Mapping[str, Report],
    curves: Mapping[str, Sequence[Mapping[str, object]]],
) -> str:
    """The headline of a run that compared nothing before and after."""
    done = f"{run.done()} of {count(len(run.steps), 'step')}"
    step = broken_step(run)
    if run.status in ("failed", "stopped"):
        where = f" at step {step.name}" if step else ""
        return f"The run {run.status}{where}; {done} done and kept."
    if run.status != "done":
        return f"The run is not at its end: {done} done."
    for name, report in reversed(list(reports.items())):
        title = name if len(reports) > 1 else excerpt(report.title, 60) or name
        m = leading(report)
        if isinstance(m, Measure):
            span = f" (95 % interval {interval(m)})" if interval(m) else ""
            return f"{title}: {m.name} {with_unit(m.value, m.unit)}{span}."
        if m:
            return f"{title}: {excerpt(m)}."
    return _trained(curves) or f"{done} done."

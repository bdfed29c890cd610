"""What a run came to: the headline, the key figures, before and after by principle.

All numbers are those of the `Report`s; nothing is measured here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

from markupsafe import Markup

from truing.report import svg
from truing.report.facts import mapping
from truing.report.tally import Tally, principles_of, tallies
from truing.report.wording import (
    count,
    difference,
    difference_interval,
    ends_of,
    interval,
    percent,
    ticks,
    value,
    with_unit,
)
from truing.reports import Measure, Report

NAMES = {
    "violation rate": "violations",
    "ability": "ability",
    "choices": "right choices",
    "relevance": "relevance",
    "words": "words an answer",
}
MEANING = {
    "relevance": "cosine of prompt and answer",
    "words": "length of an answer",
    "ability": "held-out text, nats per token",
    "choices": "multiple-choice questions",
    "unusable answers": "empty, repeated, off topic",
}
KEY_FIGURES = ("violation rate", "relevance", "words", "ability")


def find(report: Report, name: str, category: str = "") -> Measure | None:
    """The measure of that name, or None."""
    return next((m for m in report if (m.name, m.category) == (name, category)), None)


@dataclass(frozen=True)
class Change:
    """One measure before and after.

    Args:
        name: of the measure, or a principle's id.
        note: what it means, in a few words.
        difference: with its paired interval, where the report has one.
        p: of McNemar's test, where the report has one.
    """

    name: str
    note: str
    before: Measure
    after: Measure
    difference: Measure | None = None
    p: float | None = None

    @property
    def meaning(self) -> str:
        """The note, and which way is good."""
        good = f"{self.before.better} is better" if self.before.better else ""
        return ", ".join(filter(None, [self.note, good]))

    @property
    def before_text(self) -> str:
        """The value before."""
        return value(self.before.value, self.before.unit)

    @property
    def after_text(self) -> str:
        """The value after."""
        return value(self.after.value, self.after.unit)

    @property
    def before_interval(self) -> str:
        """Its interval, "" without one."""
        return interval(self.before)

    @property
    def after_interval(self) -> str:
        """Its interval, "" without one."""
        return interval(self.after)

    @property
    def difference_text(self) -> str:
        """The difference, of the report where it has one."""
        return difference(self.difference or self._plain())

    @property
    def difference_interval(self) -> str:
        """Its interval, "" without one."""
        return difference_interval(self.difference) if self.difference else ""

    @property
    def p_text(self) -> str:
        """The test's p."""
        if self.p is None:
            return ""
        return "< 0.001" if self.p < 0.001 else f"{self.p:.3f}"

    def _plain(self) -> Measure:
        b, a = self.before, self.after
        gap = a.value - b.value
        return Measure(b.name, gap, gap, gap, b.n, b.unit, b.category, b.better)

    @property
    def relative(self) -> float:
        """Change as a share of the value before; 0 when that is 0."""
        b = self.before.value
        return (self.after.value - b) / abs(b) if b else 0.0

    @property
    def clear(self) -> bool:
        """True when the difference has an interval, and 0 lies outside of it, beyond rounding."""
        d = self.difference
        return d is not None and (d.lo > 0 or d.hi < 0) and abs(d.value) >= 1e-12

    @property
    def _steady(self) -> str:
        """What a change that is not clear is called."""
        d = self.difference
        return "unclear" if d is not None and d.lo < d.hi else "same"

    @property
    def verdict(self) -> str:
        """ "better", "worse", "same"; "" when neither direction is, or no interval can tell."""
        if not self.before.better or self.difference is None:
            return ""
        if not self.clear:
            return "same"
        fell = self.after.value < self.before.value
        return "better" if fell == (self.before.better == "lower") else "worse"

    @property
    def verdict_text(self) -> str:
        """The difference and what it means; its relative size where no interval tells more."""
        if self.difference is None:
            size = f", {percent(self.relative)}" if self.relative and self.unit != "share" else ""
            return f"{self.difference_text}{size}"
        words = self._steady if self.verdict == "same" else self.verdict
        return f"{self.difference_text} {words}".strip()

    @property
    def unit(self) -> str:
        """Of both values."""
        return self.before.unit

    @property
    def in_words(self) -> str:
        """ "relevance improved by 2 %"; no more than both values where no interval tells more."""
        if self.difference is None or (self.clear and not self.relative):
            after = with_unit(self.after.value, self.unit)
            return f"{self.name} went from {self.before_text} to {after}"
        if not self.clear:
            steady = {"unclear": "did not clearly change", "same": "stayed the same"}
            return f"{self.name} {steady[self._steady]}"
        ways = {"better": "improved", "worse": "worsened"}
        way = ways.get(self.verdict, "grew" if self.relative > 0 else "fell")
        return f"{self.name} {way} by {percent(self.relative)}"

    @property
    def spoken(self) -> str:
        """What a screen reader says of the chart."""
        return f"{self.name}: {self._side('before')}, {self._side('after')}"

    def _side(self, when: str) -> str:
        measure = self.before if when == "before" else self.after
        span = interval(measure)
        return f"{when} {with_unit(measure.value, measure.unit)}" + (f" ({span})" if span else "")

    def drawn(self, scale: svg.Scale | None = None) -> Markup:
        """The chart of one row; without a scale on an axis of its own."""
        notes = (self._side("before"), self._side("after"))
        return svg.dumbbell(self.before, self.after, scale or self.scale, self.spoken, notes)

    @property
    def scale(self) -> svg.Scale:
        """An axis that holds both intervals."""
        ends = [v for m in (self.before, self.after) for v in (m.lo, m.hi, m.value)]
        return svg.Scale.around(ends, 3)

    @property
    def axis(self) -> Markup:
        """The labels of that axis."""
        return svg.axis(self.scale, ticks(self.scale.ticks, self.unit))


def change(report: Report, name: str, category: str = "", p: float | None = None) -> Change | None:
    """A measure before and after, or None when the report lacks it."""
    before = find(report, f"{name} before", category)
    after = find(report, f"{name} after", category)
    if before is None or after is None:
        return None
    wanted = "violations" if name == "violation rate" else name
    apart = find(report, f"{wanted} difference", category)
    if apart is not None and apart.n < 2:
        apart = None  # of one prompt no spread is known, so no interval
    texts = mapping(report.meta, "texts")
    note = str(texts.get(category, "")) if category else MEANING.get(name, "")
    shown = category or NAMES.get(name, name)
    return Change(shown, note, before, after, apart, p)


@dataclass(frozen=True)
class Outcome:
    """One report of before and after, ready for the page."""

    step: str
    report: Report
    overall: Change | None
    principles: Sequence[Change]
    side_effects: Sequence[Change]
    key_figures: Sequence[Change]
    not_measured: Sequence[str]
    tallies: Sequence[Tally]

    @property
    def prompts(self) -> int:
        """Number of prompts that both models answered."""
        return self.overall.before.n if self.overall else 0

    @property
    def scale(self) -> svg.Scale:
        """The common axis of all principles."""
        return svg.Scale.shares()

    @property
    def axis(self) -> Markup:
        """Its labels."""
        return svg.axis(self.scale, ticks(self.scale.ticks, "share"))

    @property
    def on_shares(self) -> list[Change]:
        """Everything drawn on that axis: each principle, and their mean where there are several."""
        if self.overall is None or len(self.principles) < 2:
            return list(self.principles)
        mean = replace(self.overall, name="all", note="mean over the principles")
        return [*self.principles, mean]

    @property
    def rows(self) -> list[Change]:
        """Everything that the table beneath the charts lists."""
        return [*([self.overall] if self.overall else []), *self.principles, *self.side_effects]

    def _against(self) -> str:
        """Principles that clearly went the other way: a mean must not hide them."""
        main = self.overall
        if main is None or main.verdict != "better":
            return ""
        worse = [
            f"{c.name} rose from {' to '.join(ends_of(c.before, c.after))}"
            for c in self.principles
            if c.verdict == "worse"
        ]
        return f", but {' and '.join(worse)}" if worse else ""

    @property
    def effects(self) -> str:
        """Relevance, length and ability in a few words."""
        return ", ".join(c.in_words for c in self.key_figures[1:])

    @property
    def headline(self) -> str:
        """The result in one sentence."""
        main = self.overall
        if main is None:
            return f"Before and after over {count(len(self.report.samples or ()), 'prompt')}."
        b, a = ends_of(main.before, main.after)
        where = f"over {count(self.prompts, 'prompt')}"
        effects = [c.in_words for c in self.key_figures if c.name in ("relevance", "ability")]
        rest = f"{self._against()}; {' and '.join(effects)}" if effects else self._against()
        if main.difference is None:
            return f"Violations of the principles: {b} before and {a} after {where}{rest}."
        if main.verdict == "better":
            return f"Violations of the principles fell from {b} to {a} {where}{rest}."
        if main.verdict == "worse":
            return f"Violations of the principles rose from {b} to {a} {where}{rest}."
        return f"No clear change in violations: {b} before and {a} after {where}{rest}."


def before_after_of(reports: Mapping[str, Report]) -> list[Outcome]:
    """One outcome for each before-and-after report, in the order of the run."""
    return [before_after(n, r) for n, r in reports.items() if is_before_after(r)]


def before_after(step: str, report: Report) -> Outcome:
    """The parts of one before-and-after report that the page shows."""
    p = mapping(report.meta, "mcnemar")
    ids = principles_of(report)
    tests = {i: float(v) for i in ids if isinstance(v := p.get(i), (int, float))}
    rules = [change(report, "violation rate", i, tests.get(i)) for i in ids]
    effects = [
        change(report, n) for n in ("relevance", "words", "ability", "choices", "unusable answers")
    ]
    figures = [change(report, n) for n in KEY_FIGURES]
    unmeasured = cast("Sequence[object]", report.meta.get("not_measured") or [])
    return Outcome(
        step,
        report,
        change(report, "violation rate"),
        [c for c in rules if c],
        [c for c in effects if c],
        [c for c in figures if c],
        [str(i) for i in unmeasured],
        tallies(report),
    )


def is_before_after(report: Report) -> bool:
    """True for what `evaluate/before_after` made."""
    return report.meta.get("kind") == "before_after"

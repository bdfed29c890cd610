"""What became of each answer under each principle: fixed, newly broken, still broken, kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from markupsafe import Markup

from truing.report.svg import stacked
from truing.reports import Report

OUTCOMES = {
    "fixed": "fixed",
    "broken": "newly broken",
    "still": "still broken",
    "kept": "kept before and after",
}


def ids_of(text: object) -> set[str]:
    """Principles as `evaluate/adherence` writes them: "brief, prose"."""
    return {v for v in str(text or "").split(", ") if v}


def became(id: str, before: set[str], after: set[str]) -> str:
    """What became of one principle in one sample: a key of `OUTCOMES`."""
    if id in before:
        return "still" if id in after else "fixed"
    return "broken" if id in after else "kept"


@dataclass(frozen=True)
class Tally:
    """How many answers went which way under one principle."""

    principle: str
    counts: dict[str, int]
    text: str
    chart: Markup


def principles_of(report: Report) -> list[str]:
    """Ids of the measured principles, in the report's order."""
    return [str(i) for i in cast("Sequence[object]", report.meta.get("principles") or [])]


def tallies(report: Report) -> list[Tally]:
    """Counts by principle over the samples of a before-and-after report."""
    sides = [
        (ids_of(r.get("violated_before")), ids_of(r.get("violated_after")))
        for r in report.samples or ()
    ]
    made: list[Tally] = []
    for id in principles_of(report) if sides else ():
        found = Counter(became(id, b, a) for b, a in sides)
        counts = {name: found[name] for name in OUTCOMES}
        text = ", ".join(f"{n} {OUTCOMES[name]}" for name, n in counts.items() if n)
        made.append(Tally(id, counts, text, stacked(counts, f"{id}: {text}", OUTCOMES)))
    return made

"""Nouns in a few words, and what was measured as a table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from truing.context import Json
from truing.models import Model
from truing.principles import Principles
from truing.reports import Measure, Report
from truing.store import Noun
from truing.tables import Table


def about(noun: Noun) -> str:
    """A noun in a few words, such as "64 pair rows"."""
    if isinstance(noun, Table):
        return f"{len(noun)} {noun.kind} row{'' if len(noun) == 1 else 's'}"
    if isinstance(noun, Principles):
        return f"{len(noun)} principle{'' if len(noun) == 1 else 's'}"
    if isinstance(noun, Model):
        laid = "".join(f" + {c.kind}" for c in noun.changes)
        return f"{noun.name}{laid}{' (quarantined)' if noun.quarantine else ''}"
    first = noun.measures[0] if noun.measures else None
    return f"{noun.title}: {first.name} {_value(first)}" if first else noun.title


def summary_of(results: Sequence[Noun]) -> dict[str, Json]:
    """The figures of the last report that sums up a run; else the first measure of each report."""
    reports = [r for r in results if isinstance(r, Report)]
    for report in reversed(reports):
        if "summary" in report.meta:
            return dict(cast("dict[str, Json]", report.meta["summary"]))
    found: dict[str, Json] = {}
    for report in reports:
        for m in report.measures:
            if not m.category:
                found[m.name] = [m.value, m.lo, m.hi]
    return found


def table_of(results: Sequence[Noun]) -> str:
    """Before and after by principle where a run compares them; else all measures."""
    reports = [r for r in results if isinstance(r, Report)]
    for report in reversed(reports):
        if report.meta.get("kind") == "before_after":
            return _before_after(report)
    return "\n\n".join(_measures(r) for r in reports)


def _value(m: Measure) -> str:
    exact = m.lo == m.hi == m.value
    return f"{m.value:.3g}" if exact else f"{m.value:.3f} [{m.lo:.3f}, {m.hi:.3f}]"


def rows_text(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as aligned columns, a line under the first."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def _measures(report: Report) -> str:
    head = ("measure", "category", "value [95 %]", "n", "unit")
    rows = [(m.name, m.category, _value(m), str(m.n), m.unit) for m in report.measures]
    return f"{report.title}\n" + rows_text([head, *rows])


def compared(report: Report) -> list[tuple[str, str, str, str]]:
    """(what, before, after, difference) of a report of before and after, each with its interval."""
    rows: list[tuple[str, str, str, str]] = []
    found = {(m.name, m.category): m for m in report.measures}
    for (name, category), before in found.items():
        if not name.endswith(" before"):
            continue
        stem = name.removesuffix(" before")
        after = found.get((f"{stem} after", category))
        if after is None:
            continue
        short = "violations" if stem == "violation rate" else stem
        difference = found.get((f"{short} difference", category))
        label = f"{short}, {category}" if category else short
        unit = "" if before.unit in ("share", "", stem) else f" ({before.unit})"
        shown = _value(difference) if difference else ""
        rows.append((label + unit, _value(before), _value(after), shown))
    return rows


def _before_after(report: Report) -> str:
    rows = [("", "before [95 %]", "after [95 %]", "difference [95 %]"), *compared(report)]
    n = report.measures[0].n if report.measures else 0
    return rows_text(rows) + f"\n{n} prompt{'' if n == 1 else 's'}"

"""Nouns in a few words, and what was measured as a table for the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import cast

from truing.context import Json
from truing.models import Model
from truing.output import printable, width
from truing.principles import Principles
from truing.report.wording import decimals
from truing.reports import Measure, Report
from truing.store import Noun
from truing.tables import Table

# What the last line of a step or a run has of its own.
OWN = (
    "job",
    "key",
    "noun",
    "about",
    "cached",
    "seconds",
    "cost",
    "cached_steps",
    "report",
    "measures",
)


def about(noun: Noun) -> str:
    """A noun in a few words, such as "64 pair rows"."""
    if isinstance(noun, Table):
        return f"{len(noun)} {noun.kind} row{'' if len(noun) == 1 else 's'}"
    if isinstance(noun, Principles):
        return f"{len(noun)} principle{'' if len(noun) == 1 else 's'}"
    if isinstance(noun, Model):
        laid = "".join(f" + {c.kind}" for c in noun.changes)
        return f"{noun.name}{laid}{' (quarantined)' if noun.quarantine else ''}"
    first = leading(noun)
    said = f"{first.name} {_value(first)}" if isinstance(first, Measure) else first
    return f"{noun.title}: {said}" if said else noun.title


def notes_of(report: Report) -> list[str]:
    """What an evaluation found beside its measures, such as why one of them is not there."""
    found = report.meta.get("notes")
    return [str(note) for note in found] if isinstance(found, list) else []


def leading(report: Report) -> Measure | str:
    """The first measure; or a note, where there is none of the whole to begin with; else ""."""
    first = report.measures[0] if report.measures else None
    notes = notes_of(report)
    return notes[0] if notes and (first is None or first.category) else first or ""


def summary_of(results: Mapping[str, Noun]) -> dict[str, Json]:
    """The figures of the reports that sum up a run; else what each report measured of the whole.

    Those that have a figure of one name stand under the names of their steps. What has a name
    of `OWN` stands under "measures".
    """
    reports = {n: r for n, r in results.items() if isinstance(r, Report)}
    sums = {n: r.meta["summary"] for n, r in reports.items() if "summary" in r.meta}
    each = {n: dict(cast("dict[str, Json]", figures)) for n, figures in sums.items()} or {
        n: {m.name: cast(Json, [m.value, m.lo, m.hi]) for m in report.measures if not m.category}
        for n, report in reports.items()
    }
    counts = Counter(name for figures in each.values() for name in figures)
    found: dict[str, Json] = {name: v for figures in each.values() for name, v in figures.items()}
    for n, figures in each.items():
        if any(counts[name] > 1 for name in figures):
            found = {k: v for k, v in found.items() if k not in figures}
            found |= {n: cast(Json, figures)}
    own = {name: found.pop(name) for name in OWN if name in found}
    if own:
        found["measures"] = own
    return found


def table_of(results: Mapping[str, Noun]) -> str:
    """Before and after by principle where a run compares them; else all measures."""
    reports = {n: r for n, r in results.items() if isinstance(r, Report)}
    compares = {n: r for n, r in reports.items() if r.meta.get("kind") == "before_after"}
    told = compares or reports
    made: list[str] = []
    for name, report in told.items():
        titles = (name if len(told) > 1 else "", "" if compares else report.title)
        table = _before_after(report) if compares else _measures(report)
        made.append("\n".join(filter(None, (": ".join(filter(None, titles)), table))))
    return "\n\n".join(made)


def _value(m: Measure) -> str:
    if m.lo == m.hi == m.value:
        return f"{m.value:.3g}" if abs(m.value) < 100 else f"{m.value:.0f}"
    value, lo, hi = (f"{v:.{decimals(m.hi - m.lo, 3)}f}" for v in (m.value, m.lo, m.hi))
    return f"{value} [{lo}, {hi}]"


def rows_text(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as aligned columns, a line under the first."""
    rows = [[printable(" ".join(cell.split())) for cell in row] for row in rows]
    widths = [max(width(row[i]) for row in rows) for i in range(len(rows[0]))]
    ruled = [rows[0], ["-" * w for w in widths], *rows[1:]]
    lines = ("  ".join(c + " " * (w - width(c)) for c, w in zip(row, widths)) for row in ruled)
    return "\n".join(line.rstrip() for line in lines)


def measured(measures: Sequence[Measure]) -> str:
    """A table of measures, each with its interval."""
    head = ("measure", "category", "value [95 %]", "n", "unit", "")
    rows = [
        (m.name, m.category, _value(m), str(m.n), m.unit, m.better and f"{m.better} is better")
        for m in measures
    ]
    return rows_text([head, *rows])


def _measures(report: Report) -> str:
    return "\n".join([measured(report.measures), *notes_of(report)])


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
    prompts = f"{n} prompt{'' if n == 1 else 's'}"
    return "\n".join([rows_text(rows), prompts, *notes_of(report)])

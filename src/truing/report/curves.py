"""Training curves of a run, from what its steps observed at every update."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from truing.report import svg
from truing.report.facts import APART, Facts, noted, of_step
from truing.report.wording import shown, signed

FIRST = ("loss", "accuracy", "margin", "lr", "grad_norm")
PAIRS = {"accuracy": "accuracy: chosen above rejected"}  # where there is a margin, too
LABELS = {
    "loss": "loss",
    "margin": "margin of the rewards",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
}
HELD = "held_out/"  # before the name of what was measured on rows that are not trained on
TABLE_ROWS = 40


@dataclass(frozen=True)
class Curve:
    """One metric over the updates of a step; `held` is its last value on held-out rows, or ""."""

    name: str
    label: str
    last: str
    chart: Markup
    held: str = ""


@dataclass(frozen=True)
class Training:
    """What one step observed.

    Args:
        curves: of the metrics that changed over updates.
        columns, rows: the same as a table, thinned to some rows.
        notes: single facts, such as how many rows were cut.
        receipt: which tokens carry loss, in the step's own text.
    """

    step: str
    updates: int
    curves: Sequence[Curve]
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[tuple[str, str]]
    receipt: str

    @property
    def held(self) -> bool:
        """Whether a curve has held-out values."""
        return any(curve.held for curve in self.curves)


def tidy(number: float, figures: int = 4) -> str:
    """A metric in so many figures, one less where it is small."""
    if not math.isfinite(number):
        return "not finite"
    if number and abs(number) < 1e-3:
        mantissa, power = f"{number:.{figures - 2}e}".split("e")
        return signed(f"{mantissa.rstrip('0').rstrip('.')}e{int(power)}")
    return signed(f"{number:.{figures}g}")


def updates(rows: Sequence[Facts]) -> list[Facts]:
    """One row for each update, in order; those of a further training are numbered on.

    What is told again as it was, as of a step that went on, is no further training.
    """
    rounds: list[dict[float, Facts]] = [{}]
    last, before = -math.inf, 0.0
    for row in rows:
        step = row.get("step")
        if not isinstance(step, (int, float)) or not math.isfinite(step):
            continue
        if step <= last and not _again(row, rounds[-1].get(step)):
            before = max(_at(r) for r in rounds[-1].values())
            rounds.append({})
        last = float(step)
        told = rounds[-1].get(last, {})
        rounds[-1][last] = {**told, **row, "step": before + last}
    return [found[s] for found in rounds for s in sorted(found)]


def _again(row: Facts, told: Facts | None) -> bool:
    """Whether a row only repeats, or adds to, what was told of its update."""
    return told is not None and all(
        told.get(n, v) == v for n, v in row.items() if n not in APART and v == v
    )


def points(rows: Sequence[Facts], name: str) -> list[tuple[float, float]]:
    """(update, value) of one metric; a value that JSON could not hold is not a number."""
    made: list[tuple[float, float]] = []
    for row in rows:
        if name in row:
            value = row[name]
            made.append((_at(row), float(value) if isinstance(value, (int, float)) else math.nan))
    return made


def _at(row: Facts) -> float:
    step = row["step"]
    return float(step) if isinstance(step, (int, float)) else 0.0


def _drawable(rows: Sequence[Facts]) -> list[str]:
    names = list(dict.fromkeys(n for row in rows for n in row if n not in APART))
    names = [n for n in names if n.removeprefix(HELD) == n or n.removeprefix(HELD) not in names]
    usable = [n for n in names if sum(math.isfinite(v) for _, v in points(rows, n)) > 0]
    return [*(n for n in FIRST if n in usable), *(n for n in usable if n not in FIRST)]


def _label(name: str, names: Sequence[str]) -> str:
    """What a metric is, among the others that the step observed: pairs alone have a margin."""
    labels = LABELS | PAIRS if "margin" in names else LABELS
    return labels.get(name, name.replace("_", " "))


def _curve(step: str, rows: Sequence[Facts], name: str, label: str) -> Curve:
    values, held = points(rows, name), points(rows, HELD + name)
    up = svg.Scale.around([v for _, v in (*values, *held)], 3)
    finite = [v for _, v in values if math.isfinite(v)]
    said = f"{step}, {label}: from {tidy(finite[0])} to {tidy(finite[-1])} in {_many(rows)} updates"
    if held:
        said += f"; held out from {tidy(held[0][1])} to {tidy(held[-1][1])}"
    ticks = [tidy(t, 12) for t in up.ticks]
    # The learning rate follows a schedule: a running mean would only round its corners.
    chart = svg.curve(values, said, name, ticks, up, smooth=name != "lr", held=held)
    return Curve(name, label, tidy(finite[-1]), chart, tidy(held[-1][1]) if held else "")


def _many(rows: Sequence[Facts]) -> int:
    """How many updates were made: before the first of them held-out rows alone are measured."""
    return sum(any(n not in APART and not n.startswith(HELD) for n in row) for row in rows)


def _notes(rows: Sequence[Facts]) -> tuple[list[tuple[str, str]], str]:
    receipt = ""
    for row in rows:
        if "step" not in row:
            receipt = str(row.get("receipt") or receipt)
    return noted(rows), receipt


def trainings(metrics: Sequence[Facts]) -> list[Training]:
    """One entry for each step that observed updates."""
    found: list[Training] = []
    for step, rows in of_step(metrics).items():
        ordered = updates(rows)
        names = _drawable(ordered)
        if not names:
            continue
        notes, receipt = _notes(rows)
        stride = max(1, math.ceil(len(ordered) / TABLE_ROWS))
        measured = sorted({n for row in ordered for n in row if n.startswith(HELD)} - set(names))
        listed = [
            row
            for i, row in enumerate(ordered)
            if i % stride == 0 or row is ordered[-1] or any(n in row for n in measured)
        ]
        columns = [*names, *measured]
        table = [[tidy(_at(r), 12), *(_cell(r.get(n)) for n in columns)] for r in listed]
        curves = [_curve(step, ordered, n, _label(n, names)) for n in names]
        told = Training(step, _many(ordered), curves, ["step", *columns], table, notes, receipt)
        found.append(told)
    return found


def _cell(value: object) -> str:
    return tidy(float(value)) if isinstance(value, (int, float)) else shown(value)


def by_update(metrics: Sequence[Facts]) -> Mapping[str, Sequence[Facts]]:
    """Step -> its rows of updates, where it has any."""
    found = {step: updates(rows) for step, rows in of_step(metrics).items()}
    return {step: rows for step, rows in found.items() if rows}

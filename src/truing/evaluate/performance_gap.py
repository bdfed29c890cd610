"""How much of the gap between a weak supervisor and a strong model's ceiling weak labels recover.

    PGR = (P_student - P_weak) / (P_ceiling - P_weak)

P is accuracy, or balanced accuracy, on labelled answers: a score above 0 says that an answer is
good. 0 where the student equals its supervisor, 1 where it reaches what true labels would have
given; not reported where the two lie less than 0.01 apart. The interval is a bootstrap over rows,
the three models' decisions on a row drawn together.
Source: "Weak-to-Strong Generalization beyond Accuracy", arXiv 2410.12621, after arXiv 2312.09390.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from truing.context import Json, current
from truing.core.rewards import score_model
from truing.core.stats import wilson
from truing.errors import InputError
from truing.method import method
from truing.models import Model
from truing.reports import Measure, Report
from truing.tables import Row, Table

SMALLEST = 0.01  # gap below which the ratio says nothing
DRAWS = 1000


def recovered(weak: float, student: float, ceiling: float) -> float | None:
    """PGR; None where there is no gap."""
    gap = ceiling - weak
    return None if abs(gap) < SMALLEST else (student - weak) / gap


def accuracy(right: Sequence[bool]) -> float:
    """Share of right decisions."""
    return sum(right) / len(right)


def balanced(right: Sequence[bool], labels: Sequence[bool]) -> float:
    """Mean over the two classes of the share of right decisions."""
    parts = [[r for r, y in zip(right, labels, strict=True) if y is c] for c in (False, True)]
    return sum(accuracy(p) for p in parts if p) / sum(1 for p in parts if p)


def interval(
    weak: Sequence[bool], student: Sequence[bool], ceiling: Sequence[bool]
) -> tuple[float, float] | None:
    """95 % interval of PGR over rows; None where no resample has a gap."""
    sides = np.array([weak, student, ceiling], dtype=float)
    source = np.random.default_rng(current().stream("bootstrap"))
    found: list[float] = []
    for _ in range(DRAWS):
        w, s, c = sides[:, source.integers(0, sides.shape[1], sides.shape[1])].mean(1)
        value = recovered(float(w), float(s), float(c))
        if value is not None:
            found.append(value)
    if not found:
        return None
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


@method(paper="weak-to-strong", needs=("weights", "logprob"), rows={"data": ("unpaired",)})
def performance_gap(weak: Model, student: Model, ceiling: Model, data: Table) -> Report:
    """How much of the gap between a weak supervisor and a strong ceiling weak labels recover."""
    rows = list(data.expect("unpaired", where="evaluate/performance_gap"))
    if not rows:
        raise InputError("no row to test on", where="evaluate/performance_gap")
    labels = [bool(r["label"]) for r in rows]
    models = {"weak": weak, "student": student, "ceiling": ceiling}
    right = {
        role: [(s > 0) is y for s, y in zip(score_model(m, rows), labels, strict=True)]
        for role, m in models.items()
    }
    n = len(rows)
    measures: list[Measure] = []
    for role, values in right.items():
        low, high = wilson(sum(values), n)
        measures.append(
            Measure(f"accuracy {role}", accuracy(values), low, high, n, "share", "", "higher")
        )
        even = balanced(values, labels)
        measures.append(
            Measure(f"balanced accuracy {role}", even, even, even, n, "share", "", "higher")
        )
    value = recovered(*(accuracy(right[r]) for r in models))
    meta: dict[str, Json] = {"kind": "performance_gap", "models": [m.name for m in models.values()]}
    ends = interval(right["weak"], right["student"], right["ceiling"])
    if value is None or ends is None:
        meta["undefined"] = f"supervisor and ceiling lie less than {SMALLEST} apart"
    else:
        measures.append(Measure("gap recovered", value, *ends, n, "share", "", "higher"))
    samples: list[Row] = [
        {
            "prompt": row["prompt"],
            "completion": row["completion"],
            "label": row["label"],
            **{f"{role}_right": right[role][i] for role in models},
            "lineage": {"parents": [row["id"]]},
        }
        for i, row in enumerate(rows)
    ]
    return Report("performance gap recovered", measures, Table("unpaired", samples), meta)

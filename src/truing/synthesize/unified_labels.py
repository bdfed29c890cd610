"""One table of right and wrong for one process reward model of all objectives.

    values and shares   1 where v_t >= threshold, else 0     rows of kind "steps"
    pairs               chosen 1, rejected 0                 each answer one step of its own

Every source, of rewards that can be verified and of those that cannot, becomes (text, 0 or 1): the
text is the prompt and the answer up to a step's end. One classifier, train/process_reward, is then
trained on all of them, and its scores have one scale, the probability of 1. `objective` keeps the
name of the source. Rows keep their separator; answers of pairs get the one that is given.

Source: "Simultaneous Multi-objective Alignment Across Verifiable and Non-verifiable Rewards", arXiv
2510.01167, whose unified model this is the data of.
"""

from __future__ import annotations

from collections import Counter
from typing import cast

from truing.context import current
from truing.errors import InputError
from truing.method import finite, method
from truing.tables import Row, Table

WHERE = "synthesize/unified_labels"


def binary(labels: list[object], threshold: float, where: str) -> list[float]:
    """1 or 0 for each label; an InputError for one that is not a finite number."""
    return [float(finite(v, what="column 'labels'", where=where) >= threshold) for v in labels]


def _of_steps(row: Row, threshold: float, where: str) -> list[Row]:
    steps, labels = cast("list[str]", row["steps"]), cast("list[object]", row["labels"])
    if len(steps) != len(labels) or not steps:
        raise InputError(
            "column 'labels' must have one number for each step", where=where, seen=labels
        )
    return [{**row, "labels": binary(labels, threshold, where)}]


def _of_pair(row: Row, separator: str) -> list[Row]:
    made: list[Row] = []
    for name, label in (("chosen", 1.0), ("rejected", 0.0)):
        if str(row[name]).strip():
            step = {"steps": [row[name]], "labels": [label], "separator": separator}
            made.append({"prompt": row["prompt"], **step})
    return made


@method(
    paper="mah-dpo",
    rows={"sources": ("steps", "pair")},
    within={"threshold": "(-inf, inf)"},  # on the scale of the labels
    makes="steps",
)
def unified_labels(
    sources: dict[str, Table], *, threshold: float = 0.85, separator: str = "\n\n"
) -> Table:
    """One table of right and wrong for one process reward model of all objectives.

    Args:
        threshold: least value of a step that counts as right.
        separator: what closes an answer of a pair.
    """
    if not sources:
        raise InputError("there is no table", where=f"{WHERE} input 'sources'")
    rows: list[Row] = []
    counts: Counter[str] = Counter()
    for name, table in sources.items():
        found = table.expect("steps", "pair", where=f"{WHERE} {name!r}")
        for i, row in enumerate(found):
            if found.kind == "steps":
                made = _of_steps(row, threshold, f"{WHERE} {name!r} {found.place(i)}")
            else:
                made = _of_pair(row, separator)
            lineage = cast(Row, row.get("lineage") or {}) | {"parents": [row["id"]]}
            for new in made:
                new.pop("id", None)
                rows.append({**new, "objective": name, "lineage": lineage})
                counts[f"steps_{name}"] += len(cast("list[float]", new["labels"]))
    right = sum(v for r in rows for v in cast("list[float]", r["labels"]))
    current().metric(rows=len(rows), right=right / max(1, sum(counts.values())), **counts)
    return Table("steps", rows, where="unified labels")

"""Label answers by a weak supervisor: a classifier's probability that each one is good.

    q = mean over supervisors of sigmoid(s);   kept where max(q, 1 - q) > sure

A supervisor is a model with a score head, such as one from `guard`, or an earlier student. What
makes its labels serve a strong student better than as they are:

    ensemble       `others` are further supervisors, of other seeds or sizes; labels are their mean
    confidence     `sure` leaves out rows of which they are not sure
    truth          `true_share` of the rows, drawn at random, keep their own label
    bootstrapping  the strong model's supervisor is a student of middle size, and so on in a row

`hard` keeps the decision alone. Train supervisors on other rows than these, or the student learns
nothing but what they have seen; then test on a third part.
Source: "Weak-to-Strong Generalization beyond Accuracy", arXiv 2410.12621.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from truing.context import current
from truing.core.batch.row_kinds import read_answers
from truing.core.judging.rewards import probabilities
from truing.core.passes.scoring import check_logits, has_head
from truing.errors import InputError
from truing.method import method
from truing.models import Model
from truing.tables import Row, Table, as_prompt

WHERE = "synthesize/weak_labels"


def ensemble(found: Sequence[Sequence[float]]) -> list[float]:
    """Mean of each row's probabilities over supervisors, which are [supervisor][row]."""
    return [sum(row) / len(row) for row in zip(*found, strict=True)]


def true_rows(data: Table, rows: Sequence[int], share: float) -> set[int]:
    """Places of the rows that keep their own label; an InputError where one has none."""
    if not 0 <= share <= 1:
        raise InputError("setting 'true_share' must be from 0 to 1", where=WHERE, seen=share)
    if not share:
        return set()
    for i in rows:
        if not isinstance(data[i].get("label"), bool):
            raise InputError(
                "setting 'true_share' needs a column 'label' with true or false",
                where=f"{WHERE} {data.place(i)}",
                seen=data[i].get("label"),
            )
    source = random.Random(current().stream("truth"))
    return set(source.sample(list(rows), round(share * len(rows))))


def _check_supervisors(models: Sequence[Model]) -> None:
    """Raise InputError for one that has no score head, or a head of values."""
    for one in models:
        if not has_head(one):
            raise InputError(
                "the supervisor has no score head",
                where=WHERE,
                seen=one.name,
                fix="Train one with guard",
            )
        check_logits(one, WHERE)


@method(
    paper="weak-to-strong",
    needs=("weights", "logprob"),
    rows={"data": ()},  # of any kind: those without an answer are passed over
    within={"sure": (0.0, 1.0), "true_share": (0.0, 1.0)},  # before a model is fetched
    makes="judgement",
)
def weak_labels(
    model: Model,
    data: Table,
    others: dict[str, Model] | None = None,
    *,
    hard: bool = False,
    sure: float = 0.0,
    true_share: float = 0.0,
) -> Table:
    """Label answers by a weak supervisor: a classifier's probability that each one is good.

    Args:
        model: the weak supervisor, which has a score head.
        hard: 0 or 1 in place of the probability.
        sure: what the more likely label's probability must exceed; 0 keeps all rows.
        true_share: share of all rows that keep their own label, which is sure.
    """
    supervisors = [model, *(others or {}).values()]
    _check_supervisors(supervisors)
    data = read_answers(data, WHERE)
    at = [i for i, r in enumerate(data) if "completion" in r]
    if not at:
        raise InputError(
            "no row has a completion",
            where=data.source,
            seen=data.columns,
            fix="Give the answers in a column 'completion'",
        )
    rows = [data[i] for i in at]
    known = true_rows(data, at, true_share)
    found = ensemble([probabilities(m, rows, WHERE) for m in supervisors])
    made: list[Row] = []
    for i, row, q in zip(at, rows, found, strict=True):
        if i not in known and max(q, 1 - q) <= sure:
            continue
        label = float(bool(row["label"])) if i in known else float(q > 0.5) if hard else q
        judge = "label" if i in known else " + ".join(m.name for m in supervisors)
        lineage = {"judge": judge, "parents": [row["id"]]}
        # The student must learn the label at the token that the supervisor read it at.
        ended = {"finished": row["finished"]} if "finished" in row else {}
        made.append(
            {
                "prompt": as_prompt(row)["prompt"],
                "completion": row["completion"],
                "score": label,
                **ended,
                "lineage": lineage,
            }
        )
    if not made:
        raise InputError(
            "setting 'sure': of no row is the supervisor that sure",
            where=WHERE,
            seen=sure,
            fix=f"Set it lower: the surest label has {max(max(q, 1 - q) for q in found):.3f}",
        )
    current().metric(rows=len(rows), labelled=len(made), true_labels=len(known))
    return Table("judgement", made, where=f"weak labels of {data.source}")

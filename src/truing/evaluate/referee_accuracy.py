"""How well a model grades candidate answers side by side: its scores against a known order.

    accuracy = mean over rows of the share of pairs with unequal gold scores that it puts in order
    tau      = mean over rows of Kendall's (concordant - discordant) / (N (N - 1) / 2)

A row's candidates are graded together, in a drawn order, as a referee is trained (train/urpo); with
`grades` above 1 several times, and the mean score counts. Equal scores of a pair count one half in
the accuracy and 0 in tau. A row whose scores cannot be read when asked twice counts 0 in both, as
it does in training, and its share is told. Rows are groups with gold scores, or pairs; those of a
single candidate or of equal scores show no order, are left out and counted. Intervals: Wilson for
shares, and for tau where every row is in order, reversed or neither, else a bootstrap over rows.

Source: what "URPO", arXiv 2507.17515, is trained and tested by (its agreement in rank, and accuracy
on held-out pairs); a referee no better than 0.5 is not worth learning from.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

from truing.context import Json
from truing.core.batch.row_kinds import as_kind, nothing_left
from truing.core.judging.judge_form import shown
from truing.core.judging.referee import graded, kendall, ranked, referee_of, unranked
from truing.core.stats import shares, wilson
from truing.errors import InputError
from truing.method import method
from truing.models import Model
from truing.reports import Measure, Report
from truing.tables import Row, Table, as_prompt, content_hash, prompt_of

WHERE = "evaluate/referee_accuracy"


def in_order(scores: Sequence[float], gold: Sequence[float]) -> float:
    """Share of pairs with unequal gold scores that `scores` puts in order; equal ones one half."""
    pairs = [(i, j) for i in range(len(gold)) for j in range(len(gold)) if gold[i] > gold[j]]
    won = [0.5 if scores[i] == scores[j] else float(scores[i] > scores[j]) for i, j in pairs]
    return sum(won) / len(won)


def _ranked(data: Table) -> tuple[list[Row], Counter[str]]:
    """Rows that show an order, and how many do not."""
    table, _ = as_kind(data, "group", WHERE)
    kept: list[Row] = []
    counts: Counter[str] = Counter()
    for i, row in enumerate(table):
        try:
            why = unranked(*ranked(row))
        except InputError as error:
            error.where = f"{WHERE} {table.place(i)}"
            raise
        if why:
            counts[why] += 1
        else:
            kept.append(row)
    if not kept:
        raise nothing_left(data, counts, WHERE)
    return kept, counts


@method(
    paper="urpo",
    needs=("generate",),
    rows={"data": ("group", "pair")},
    within={"grades": (1, None), "max_tokens": (1, None)},
)
def referee_accuracy(
    model: Model, data: Table, *, criteria: str = "", grades: int = 1, max_tokens: int = 256
) -> Report:
    """How well a model grades candidate answers side by side: its scores against a known order.

    Args:
        data: groups with gold scores, or pairs.
        criteria: what a good answer is, as the referee is told; those that it was trained with.
        grades: gradings of each row, each in an order of its own.
        max_tokens: longest reply.
    """
    rows, counts = _ranked(data.expect("group", "pair", where=WHERE))
    sides = [ranked(row) for row in rows]
    asked = [(shown(as_prompt(r)), texts) for r, (texts, _) in zip(rows, sides, strict=True)]
    found = graded(
        asked,
        referee_of(model, max_tokens),
        [random.Random(content_hash(one)) for one in asked],
        grades=grades,
        chunk=max(len(texts) for texts, _ in sides),
        criteria=criteria,
    )
    golds = [gold for _, gold in sides]
    won = [0.0 if s is None else in_order(s, g) for s, g in zip(found, golds, strict=True)]
    taus = [0.0 if s is None else kendall(s, g) for s, g in zip(found, golds, strict=True)]
    n, unread = len(rows), sum(s is None for s in found)
    measures = [
        Measure("accuracy", sum(won) / n, *wilson(sum(won), n), n, "share", "", "higher"),
        Measure("tau", sum(taus) / n, *shares(taus, -1), n, "", "", "higher"),
        Measure("unread", unread / n, *wilson(unread, n), n, "share", "", "lower"),
    ]
    samples: list[Row] = [
        {
            "prompt": prompt_of(row),
            "completions": texts,
            "scores": gold,
            "grades": scores,
            "tau": tau,
            "lineage": {"parents": [row["id"]]},
        }
        for row, (texts, gold), scores, tau in zip(rows, sides, found, taus, strict=True)
    ]
    facts: dict[str, Json] = {"kind": "referee_accuracy", "model": model.name}
    facts |= {"model_key": model.key, **dict(sorted(counts.items()))}
    return Report("referee accuracy on ranked rows", measures, Table("group", samples), facts)

"""Label answers by a weak supervisor: a classifier's probability that each one is good.

The supervisor is a model with a score head, such as one from `guard`. `hard` keeps its decision
alone, `sure` only rows of which it is sure: max(q, 1 - q) above the threshold. Train the supervisor
on other rows than these, or the strong student learns nothing but what it has seen.
Source: "Weak-to-Strong Generalization beyond Accuracy", arXiv 2410.12621.
"""

from __future__ import annotations

import math

from truing.core.rewards import score_model
from truing.core.scoring import has_head
from truing.errors import InputError
from truing.method import method
from truing.models import Model
from truing.tables import Row, Table


@method(paper="weak-to-strong", needs=("weights", "logprob"))
def weak_labels(model: Model, data: Table, *, hard: bool = False, sure: float = 0.0) -> Table:
    """Label answers by a weak supervisor: a classifier's probability that each one is good.

    Args:
        hard: 0 or 1 in place of the probability.
        sure: least probability of the more likely label; 0 keeps all rows.
    """
    if not has_head(model):
        raise InputError(
            "the supervisor has no score head",
            where="synthesize/weak_labels",
            seen=model.name,
            fix="Train one with guard",
        )
    rows = [r for r in data if "completion" in r]
    if not rows:
        raise InputError("no row has a completion", where=data.source, seen=data.columns)
    made: list[Row] = []
    for row, score in zip(rows, score_model(model, rows), strict=True):
        q = 1 / (1 + math.exp(-score)) if score > -700 else 0.0
        if max(q, 1 - q) < sure:
            continue
        lineage = {"judge": model.name, "parents": [row["id"]]}
        made.append(
            {
                "prompt": row["prompt"],
                "completion": row["completion"],
                "score": float(q > 0.5) if hard else q,
                "lineage": lineage,
            }
        )
    return Table("judgement", made, where=f"weak labels of {data.source}")

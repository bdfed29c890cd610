"""Train a classifier head that says whether an answer is good, such as a safety guard.

    -y logsigmoid(s) - (1 - y) logsigmoid(-s),   good answers y = 1, bad ones y = 0

each class with a weight of its own, for classes of different size

s is a linear head on the last hidden state of the answer's last token; sigmoid(s) is the
probability that the answer is good. `guard` registers it as a reward too, in [0, 1].
Our own smallest form of the guards of arXiv 2312.06674, with a head in place of generated words.

Shapes: U rows, K = 1 branch.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn.functional import logsigmoid

from truing.core.judging.rewards import check_reward_model, held_model, probabilities
from truing.core.objective import Loss, Measurements, objective
from truing.core.passes.scoring import check_logits
from truing.method import component
from truing.naming import ModelKey
from truing.own_checks import checks
from truing.tables import Row

WHERE = "reward guard"


def _check(settings: Mapping[str, object]) -> None:
    """What `core.judging.scores` asks before anything is drawn."""
    model = held_model(str(settings["model"]), WHERE)
    check_reward_model(model, WHERE)
    check_logits(model, WHERE)


@component("reward", name="guard")
@checks(_check)
def probability(rows: list[Row], *, model: ModelKey) -> list[float]:
    """Probability that each answer is good, by a trained guard.

    Args:
        model: name of the guard, or in Python its key, as `truing.models.hold` gives it.
    """
    return probabilities(held_model(model, WHERE), rows, WHERE)


@objective(
    paper="preference-losses",
    unit="token",
    needs=("scores",),
    rows="unpaired",
    columns={"label": None},
    within={"good_weight": (0, None), "bad_weight": (0, None)},
)
def guard(m: Measurements, *, good_weight: float = 1.0, bad_weight: float = 1.0) -> Loss:
    """Train a classifier head that says whether an answer is good, such as a safety guard.

    Args:
        good_weight: of good answers.
        bad_weight: of bad answers.
    """
    s_U, good_U = m.last("scores")[:, 0], m["label"] > 0
    per_row = -logsigmoid(torch.where(good_U, s_U, -s_U))
    weight_U = torch.where(good_U, good_weight, bad_weight)
    seen = {"accuracy": ((s_U > 0) == good_U).float().detach(), "score": s_U.detach()}
    return Loss(per_row, weight_U, seen)

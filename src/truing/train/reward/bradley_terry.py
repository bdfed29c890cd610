"""Train a reward model on pairs: the score of the chosen answer above that of the rejected one.

    bradley_terry   -logsigmoid(s_w - s_l - margin) + centring (s_w + s_l)^2
                    - imitation mean_t log p(y_w,t | x, y_w,<t)
    plackett_luce   -sum_k [s_k - logsumexp_j s_j]   over the answers j that rank no higher than k
    classify_pairs  -logsigmoid(s_w) - logsigmoid(-s_l): order-consistent classification, no pairing
    score_answers   (s - score)^2: regression on given scores

s is a linear head on the last hidden state of an answer's last token. `margin` is an optional
column (how much better the chosen answer is), centring keeps scores near 0 (0.01 is usual), since
the first form is blind to a constant added for each prompt. Imitation keeps the trunk a language
model: p is of the vocabulary's own head, which stays beside the score's; 1 is the paper's weight, 0
costs nothing, anything else a second pass of the trunk. With two answers the list's form is the
first. In lists, answers of equal score are each set against the other (Breslow's form of ties);
pairs that are ties are for `tied_pairs`.

Sources: Bradley-Terry reward models as in arXiv 2203.02155; margins arXiv 2307.09288; centring
arXiv 2312.09244; imitation arXiv 2307.04964; lists R. L. Plackett 1975; classification arXiv
2411.04991. The table of reward models that they belong to: arXiv 2507.13158.

Shapes: U rows, K = 2 branches (plackett_luce: the answers of a group, score_answers: 1).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn.functional import logsigmoid

from truing.core.judging.rewards import check_reward_model, held_model, score_model
from truing.core.objective import Loss, Measurements, objective, reward_metrics
from truing.errors import InputError
from truing.method import component
from truing.naming import ModelKey
from truing.own_checks import checks
from truing.tables import Row

WHERE = "reward reward_model"
LEAST = -1e9  # below every score; -inf has no gradient


def _check(settings: Mapping[str, object]) -> None:
    """What `core.judging.scores` asks before anything is drawn."""
    check_reward_model(held_model(str(settings["model"]), WHERE), WHERE)


@component("reward")
@checks(_check)
def reward_model(rows: list[Row], *, model: ModelKey) -> list[float]:
    """What a trained reward model says: its head's score, or a tuned model's implicit reward.

    Args:
        model: name of the model, or in Python its key, as `truing.models.hold` gives it.
    """
    return score_model(held_model(model, WHERE), rows)


def with_imitation(ranked: Loss, m: Measurements, weight: float) -> Loss:
    """`ranked` and the chosen answers' negative log-likelihood, each the mean over its tokens."""
    if weight < 0:
        raise InputError("setting 'imitation' must not be negative", seen=weight)
    logp_U = m.mean("logp")[:, 0]
    return ranked + weight * Loss(-logp_U, metrics={"logp": logp_U.detach()})


@objective(
    paper="preference-losses",
    unit="pair",
    needs=("scores", "logp"),
    rows="pair",
    columns={"margin": 0.0},
    only={"logp": "imitation"},
    within={"centring": (0, None)},
)
def bradley_terry(m: Measurements, *, centring: float = 0.0, imitation: float = 0.0) -> Loss:
    """Train a reward model on pairs: the chosen answer's score above the rejected one's.

    Args:
        centring: weight of the squared sum of both scores; 0.01 is usual.
        imitation: weight of the chosen answer's negative log-likelihood; 0 does without it.
    """
    w_U, l_U = m.last("scores").unbind(1)
    per_pair = -logsigmoid(w_U - l_U - m["margin"]) + centring * (w_U + l_U).square()
    made = Loss(per_pair, metrics=reward_metrics(w_U, l_U))
    return with_imitation(made, m, imitation) if imitation else made


@objective(
    paper="irl-survey", unit="group", needs=("scores",), rows="group", columns={"scores": None}
)
def plackett_luce(m: Measurements) -> Loss:
    """Train a reward model on ranked lists of answers."""
    there_UK, s_UK = m.there_UK > 0, m.last("scores")
    given_UK = m.columns["scores"].masked_fill(~there_UK, LEAST)
    below_UKJ = there_UK[:, None, :] & (given_UK[:, None, :] <= given_UK[:, :, None])
    among_UK = torch.where(below_UKJ, s_UK[:, None, :], LEAST).logsumexp(2)
    per_rank = torch.where(there_UK, among_UK - s_UK, 0.0)
    order_UK = given_UK.argsort(dim=1, descending=True, stable=True)
    s_UK = s_UK.masked_fill(~there_UK, LEAST).gather(1, order_UK)
    first_U, second_U = s_UK[:, 0], s_UK[:, min(1, s_UK.shape[1] - 1)]
    return Loss(per_rank.sum(1), metrics={"accuracy": (first_U > second_U).float().detach()})


@objective(paper="irl-survey", unit="pair", needs=("scores",), rows="pair")
def classify_pairs(m: Measurements) -> Loss:
    """Train a reward model to tell chosen from rejected answers one by one, without pairing."""
    w_U, l_U = m.last("scores").unbind(1)
    return Loss(-logsigmoid(w_U) - logsigmoid(-l_U), metrics=reward_metrics(w_U, l_U))


@objective(
    paper="irl-survey", unit="token", needs=("scores",), rows="judgement", columns={"score": None}
)
def score_answers(m: Measurements) -> Loss:
    """Train a reward model on given scores by least squares."""
    s_U = m.last("scores")[:, 0]
    off_U = s_U - m["score"]
    return Loss(off_U.square(), metrics={"error": off_U.abs().detach(), "reward": s_U.detach()})

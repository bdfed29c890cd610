"""RRHF: rank the answers of a prompt by their mean log-probability as their scores rank them.

    sum over pairs (i, j) with s_i < s_j of relu(p_i - p_j)  +  lam * (-p_best)     arXiv 2304.05302

p_i = lp(y_i|x) / |y_i|^penalty is the model's score of answer i, s_i the given one. No margin, and
a sum over pairs. The last term, here the token mean, imitates the best answer (the first of equal
ones). The official code divides by padded lengths; this one uses the answers' own.

Shapes: U groups, K answers (fewer in some groups), I = J = K.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import relu

from truing.core.objective import Loss, Measurements, objective


def best_of(m: Measurements) -> Tensor:
    """Index of the answer with the highest score of each group, [U]."""
    score_UK = torch.where(m.there_UK > 0, m["scores"], -torch.inf)
    return score_UK.argmax(1)


def ranked_alike(p_UK: Tensor, m: Measurements) -> Tensor:
    """Share of the pairs of a group whose order under p is that of the scores, [U]."""
    worse_UIJ = (m["scores"][:, :, None] < m["scores"][:, None, :]).float()
    worse_UIJ = worse_UIJ * m.there_UK[:, :, None] * m.there_UK[:, None, :]
    right_UIJ = (p_UK[:, :, None] < p_UK[:, None, :]).float() * worse_UIJ
    return (right_UIJ.sum((1, 2)) / worse_UIJ.sum((1, 2)).clamp(min=1)).detach()


@objective(
    paper="preference-losses",
    unit="group",
    needs=("logp",),
    rows="group",
    columns={"scores": None},
    within={"lam": (0, None), "penalty": (0, None)},
)
def rrhf(m: Measurements, *, lam: float = 1.0, penalty: float = 1.0) -> Loss:
    """RRHF: rank the answers of a prompt by their mean log-probability as their scores do.

    Args:
        lam: weight of the likelihood of the best answer.
        penalty: exponent of the length by which log-probabilities are divided.
    """
    p_UK = m.seq() / m.length_UK.clamp(min=1) ** penalty
    worse_UIJ = (m["scores"][:, :, None] < m["scores"][:, None, :]).float()
    worse_UIJ = worse_UIJ * m.there_UK[:, :, None] * m.there_UK[:, None, :]
    rank_U = (relu(p_UK[:, :, None] - p_UK[:, None, :]) * worse_UIJ).sum((1, 2))
    best_U = m.mean().gather(1, best_of(m)[:, None])[:, 0]
    seen = {"accuracy": ranked_alike(p_UK, m), "logp_best": best_U.detach()}
    return Loss(rank_U - lam * best_U, metrics=seen)

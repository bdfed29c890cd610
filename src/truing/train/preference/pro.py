"""Preference ranking optimisation: each answer against all that rank below it.

    sum_{k<n} -log [ exp(p_k T_k^k) / (exp(p_k T_k^k) + sum_{j>k} exp(p_j T_k^j)) ]
    + sft_weight (n-1)^2 (-lp(y_1|x)),   T_k^j = s_k - s_j,  T_k^k = max_j T_k^j    (2306.17492)

Answers are sorted by their scores s, best first; p = lp(y|x) / |y|. With `gaps` off every T is 1:
two answers are then -logsigmoid(p_1 - p_2). Computed with logsumexp where the published code adds
an eps inside the logarithm. Answers of equal score have T = 0 and are not told apart: such a rank
without any worse one below it adds nothing.

Shapes: U groups, K answers (fewer in some groups), in the order of their scores.
"""

from __future__ import annotations

import torch
from torch import Tensor

from truing.core.objective import Loss, Measurements, objective
from truing.train.preference.rrhf import ranked_alike


def ranking_loss(p_UK: Tensor, score_UK: Tensor, there_UK: Tensor, gaps: bool) -> Tensor:
    """The first line of the equation for answers sorted best first, [U]."""
    total_U = torch.zeros_like(p_UK[:, 0])
    for k in range(p_UK.shape[1] - 1):
        below_UJ = there_UK[:, k + 1 :] > 0
        gap_UJ = score_UK[:, k : k + 1] - score_UK[:, k + 1 :]
        below_UJ = below_UJ & (gap_UJ > 0)
        t_UJ = torch.where(below_UJ, gap_UJ if gaps else torch.ones_like(gap_UJ), 0.0)
        own_U = p_UK[:, k] * t_UJ.amax(1)
        rest_UJ = torch.where(below_UJ, p_UK[:, k + 1 :] * t_UJ, -torch.inf)
        all_UJ = torch.cat([own_U[:, None], rest_UJ], 1)
        total_U = total_U + torch.where(below_UJ.any(1), all_UJ.logsumexp(1) - own_U, 0.0)
    return total_U


@objective(
    paper="preference-losses", unit="group", needs=("logp",), rows="group", columns={"scores": None}
)
def pro(m: Measurements, *, sft_weight: float = 0.05, gaps: bool = True) -> Loss:
    """Preference ranking optimisation: each answer against all that rank below it.

    Args:
        sft_weight: weight of the likelihood of the best answer, times (n-1)^2.
        gaps: let score gaps be temperatures; off, all are 1.
    """
    score_UK = torch.where(m.there_UK > 0, m["scores"], -torch.inf)
    order_UK = score_UK.argsort(dim=1, descending=True, stable=True)
    p_UK, there_UK = m.mean().gather(1, order_UK), m.there_UK.gather(1, order_UK)
    ranked_U = ranking_loss(p_UK, m["scores"].gather(1, order_UK), there_UK, gaps)
    best_U = m.seq().gather(1, order_UK)[:, 0]
    weight_U = sft_weight * (there_UK.sum(1) - 1) ** 2
    seen = {"accuracy": ranked_alike(m.mean(), m), "logp_best": best_U.detach()}
    return Loss(ranked_U - weight_U * best_U, metrics=seen)

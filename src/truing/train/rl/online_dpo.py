"""Online DPO: the model's own best and worst answers become pairs, again and again.

    w, l = the answers of a group with the largest and the smallest reward
    d = lp(w) - lp_ref(w) - lp(l) + lp_ref(l)
    sigmoid  -logsigmoid(beta d)                                                  arXiv 2402.04792
    ipo      (d - 1 / (2 beta))^2, log-ratios summed                              arXiv 2405.08448

Groups whose answers all have one reward make no pair; they are counted and weigh nothing. Of equal
extremes the first is taken. `missing_end` punishes answers without a stop token.

Shapes: U groups, K answers, T tokens.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn.functional import logsigmoid

from truing.core.objective import Loss, Measurements, reward_metrics
from truing.core.online import Update, online


def picked(value_UK: Tensor, index_U: Tensor) -> Tensor:
    """One branch of each unit, [U]."""
    return value_UK.gather(1, index_U.long()[:, None])[:, 0]


def extremes(r: Measurements) -> dict[str, Tensor]:
    """Numbers of the best and the worst answer of each group, and 1.0 where they differ."""
    reward_UK = r["reward"]
    best_U, worst_U = reward_UK.argmax(1), reward_UK.argmin(1)
    differ_U = reward_UK.amax(1) > reward_UK.amin(1)
    return {"best": best_U.float(), "worst": worst_U.float(), "paired": differ_U.float()}


def pair_loss(m: Measurements, beta: float, kind: Literal["sigmoid", "ipo"] = "sigmoid") -> Loss:
    """DPO's or IPO's loss of the pairs that `extremes` named."""
    r_UK = m.ratio()
    w_U, l_U = picked(r_UK, m["best"]), picked(r_UK, m["worst"])
    d_U = w_U - l_U
    per_U = -logsigmoid(beta * d_U) if kind == "sigmoid" else (d_U - 1 / (2 * beta)) ** 2
    return Loss(per_U, m["paired"], reward_metrics(beta * w_U, beta * l_U))


@online(paper="preference-losses", needs=("ref_logp",), least=2, tempered=False)
def online_dpo(
    r: Measurements,
    *,
    beta: float = 0.1,
    kind: Literal["sigmoid", "ipo"] = "sigmoid",
    answers: int = 2,
    temperature: float = 0.9,
) -> Update:
    """Online DPO: the model's own best and worst answers become pairs, again and again.

    Args:
        beta: strength of the pull towards the reference.
        kind: DPO's logistic loss, or IPO's square.
    """
    pairs = extremes(r)
    return Update(pairs, lambda m: pair_loss(m, beta, kind), active_U=pairs["paired"] > 0)

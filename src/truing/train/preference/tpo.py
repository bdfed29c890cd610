"""Triple preference optimisation: a gold answer to imitate beside a preferred and a worse one.

    tpo     -logsigmoid(beta (lp_w - lp_l)) + alpha nll(gold)                       arXiv 2405.16681
    tpo_l   -logsigmoid(beta (mean_lp_w - mean_lp_l) - gamma) + alpha nll(gold)

Rows are pairs with a third answer in the column `gold`; there is no reference model.

Shapes: U pairs, K = 3 branches: chosen, rejected, gold.
"""

from __future__ import annotations

from truing.core.objective import Loss, Measurements, objective, reward_metrics
from truing.train.preference.dpo import smoothed
from truing.train.supervised.sft import nll


@objective(
    paper="preference-losses",
    unit="pair",
    needs=("logp",),
    rows="pair",
    texts={"gold": None},
    within={"alpha": (0, None)},
)
def tpo(m: Measurements, *, beta: float = 0.01, alpha: float = 1.0) -> Loss:
    """Triple preference optimisation: a gold answer to imitate beside the pair.

    Args:
        alpha: weight of the likelihood of the gold answer.
        beta: steepness of the preference term.
    """
    w_U, l_U, _ = (beta * m.seq()).unbind(1)
    return Loss(smoothed(w_U - l_U, 0.0), metrics=reward_metrics(w_U, l_U)) + alpha * nll(m, 2)


@objective(
    paper="preference-losses",
    unit="pair",
    needs=("logp",),
    rows="pair",
    texts={"gold": None},
    within={"alpha": (0, None), "gamma": (0, None)},
)
def tpo_l(m: Measurements, *, beta: float = 0.01, gamma: float = 0.5, alpha: float = 1.0) -> Loss:
    """Triple preference optimisation on mean log-probabilities with a margin.

    Args:
        beta: steepness of the preference term.
        gamma: margin between the rewards.
        alpha: weight of the likelihood of the gold answer.
    """
    w_U, l_U, _ = (beta * m.mean()).unbind(1)
    seen = reward_metrics(w_U, l_U)
    return Loss(smoothed(w_U - l_U - gamma, 0.0), metrics=seen) + alpha * nll(m, 2)

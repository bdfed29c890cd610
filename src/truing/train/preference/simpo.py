"""SimPO: the mean log-probability of an answer is its reward; no reference, a target margin.

    simpo     -logsigmoid(beta (mean_lp_w - mean_lp_l) - gamma)                     arXiv 2405.14734
    alphapo   the same with mean_lp replaced by (1 - p^-alpha) / alpha,
              p = exp(mean_lp); alpha = 0 is simpo                                  arXiv 2501.03884

The paper uses beta 2 to 2.5 and gamma / beta of about 0.3 to 0.6; label_smoothing as in cdpo.
The exponent -alpha mean_lp is clamped at 80.

Shapes: U pairs, K = 2 branches.
"""

from __future__ import annotations

from torch import Tensor

from truing.core.objective import Loss, Measurements, objective, reward_metrics
from truing.core.passes.exponentials import expm1_up_to
from truing.train.preference.dpo import smoothed


def shaped(mean_lp: Tensor, alpha: float) -> Tensor:
    """(1 - p^-alpha) / alpha of p = exp(mean_lp); mean_lp itself at alpha = 0."""
    if alpha == 0:
        return mean_lp
    return -expm1_up_to(-alpha * mean_lp) / alpha


@objective(
    paper="preference-losses",
    unit="pair",
    needs=("logp",),
    rows="pair",
    within={"gamma": (0, None)},
)
def simpo(
    m: Measurements, *, beta: float = 2.0, gamma: float = 1.0, label_smoothing: float = 0.0
) -> Loss:
    """SimPO: the mean log-probability is the reward; no reference, a target margin.

    Args:
        beta: steepness.
        gamma: margin that the chosen answer's reward should have.
        label_smoothing: share of labels that may be wrong.
    """
    w_U, l_U = (beta * m.mean()).unbind(1)
    return Loss(smoothed(w_U - l_U - gamma, label_smoothing), metrics=reward_metrics(w_U, l_U))


@objective(
    paper="preference-losses",
    unit="pair",
    needs=("logp",),
    rows="pair",
    within={"gamma": (0, None)},
)
def alphapo(m: Measurements, *, beta: float = 2.0, gamma: float = 1.0, alpha: float = 0.25) -> Loss:
    """AlphaPO: SimPO with the shape of the reward as a setting.

    Args:
        beta: steepness.
        gamma: margin that the chosen answer's reward should have.
        alpha: 0 is the log-probability; above, low probabilities are punished more.
    """
    w_U, l_U = (beta * shaped(m.mean(), alpha)).unbind(1)
    return Loss(smoothed(w_U - l_U - gamma, 0.0), metrics=reward_metrics(w_U, l_U))

"""Make a model safer from harmful answers alone: push each below what the model itself says.

    d2o              -logsigmoid((beta / K) sum_i r(y_i) - alpha r(y_l)),   r(y) = lp - lp_ref
    d2o_pair         -logsigmoid(beta r(y_w) - alpha r(y_l))
    gradient_ascent  + the mean of lp over all tokens of the step: the baseline that forgets all

y_l is the negative (rejected) answer, y_1 .. y_K answers that the model itself drew under varied
moral reminders, before training or, with `refresh` of d2o, every so many updates anew; their
log-probabilities are taken without the reminder. Each pair of chosen answers and their noise is so
replaced by the mean over a distribution: one bad sample counts 1/K. Both references of the paper
are the starting model, as in its experiments. d2o_pair is K = 1 with a human positive y_w: DPO with
two betas, and DPO where they are equal. Watch `weight`, 1 - sigmoid(.): it goes to 0 where the
negative is already unlikely, while that of gradient ascent never falls.

Source: "Negating Negatives: Alignment without Human Positive Samples via Distributional
Dispreference Optimization", arXiv 2403.03419; the reminders are our own. Log-probabilities are
summed as in the paper, so long answers dominate; `length_normalise` of d2o and d2o_pair divides
each by its length.

Shapes: U rows; of d2o K + 1 branches, the negative, then the model's own answers.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from truing.core.objective import Loss, Measurements, objective, reward_metrics


def ratios(m: Measurements, length_normalise: bool) -> Tensor:
    """r of each branch, [U, K]."""
    return m.ratio() / m.length_UK.clamp(min=1) if length_normalise else m.ratio()


@objective(
    paper="d2o",
    unit="group",
    needs=("logp", "ref_logp"),
    rows="negative",
    hook="guided_samples",
    within={"alpha": (0, None)},
)
def d2o(
    m: Measurements, *, beta: float = 0.1, alpha: float = 0.1, length_normalise: bool = False
) -> Loss:
    """Make a model safer from harmful answers alone: push each below what the model itself says.

    Args:
        beta: weight of the model's own answers.
        alpha: weight of the negative answer.
        length_normalise: divide each log-ratio by the length of its answer.
    """
    r_UK = ratios(m, length_normalise)
    own_UK = m.there_UK[:, 1:]
    own_U = (r_UK[:, 1:] * own_UK).sum(1) / own_UK.sum(1).clamp(min=1)
    z_U = beta * own_U - alpha * r_UK[:, 0]
    seen = {
        "weight": (-z_U).sigmoid().detach(),
        "own": own_U.detach(),
        "negative": r_UK[:, 0].detach(),
    }
    return Loss(-logsigmoid(z_U), metrics=seen)


@objective(
    paper="d2o",
    unit="pair",
    needs=("logp", "ref_logp"),
    rows="pair",
    within={"alpha": (0, None)},
)
def d2o_pair(
    m: Measurements, *, beta: float = 0.1, alpha: float = 0.1, length_normalise: bool = False
) -> Loss:
    """Push harmful answers below a human one for each: DPO with a beta for either side.

    Args:
        beta: weight of the chosen answer.
        alpha: weight of the rejected answer.
        length_normalise: divide each log-ratio by the length of its answer.
    """
    r_UK = ratios(m, length_normalise)
    z_U = beta * r_UK[:, 0] - alpha * r_UK[:, 1]
    seen = reward_metrics(beta * r_UK[:, 0], alpha * r_UK[:, 1])
    return Loss(-logsigmoid(z_U), metrics=seen | {"weight": (-z_U).sigmoid().detach()})


@objective(paper="d2o", unit="token", needs=("logp",), rows="negative")
def gradient_ascent(m: Measurements) -> Loss:
    """Raise the loss on harmful answers, without anything to hold the rest: a baseline."""
    return Loss(m.logp_UKT, m.mask_UKT, {"logp": m.mean()[:, 0].detach()})

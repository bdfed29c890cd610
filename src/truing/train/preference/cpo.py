"""Contrastive preference optimisation: DPO without a reference, held up by likelihood.

    cpo    smoothed logistic on beta (lp_w - lp_l) + alpha nll(chosen)              arXiv 2401.08417
           loss="hinge": relu(1 - beta (lp_w - lp_l));
           loss="ipo":   (mean_lp_w - mean_lp_l - 1/(2 beta))^2
    slic   relu(delta - (lp_w - lp_l)) + alpha nll(reference answer)                arXiv 2305.10425

lp is the sum, mean_lp the mean of an answer's log-probabilities. SLiC's reference answer is the
column `gold`, or the chosen answer where there is none.

Shapes: U pairs, K = 2 branches (slic: 3, the third is the reference answer).
"""

from __future__ import annotations

from typing import Literal

from torch.nn.functional import relu

from truing.core.objective import Loss, Measurements, objective, reward_metrics
from truing.errors import InputError
from truing.train.preference.dpo import smoothed
from truing.train.supervised.sft import nll


@objective(
    paper="preference-losses",
    unit="pair",
    needs=("logp",),
    rows="pair",
    within={"alpha": (0, None)},
)
def cpo(
    m: Measurements,
    *,
    beta: float = 0.1,
    alpha: float = 1.0,
    label_smoothing: float = 0.0,
    loss: Literal["sigmoid", "hinge", "ipo"] = "sigmoid",
) -> Loss:
    """Contrastive preference optimisation: DPO without a reference, held up by likelihood.

    Args:
        beta: steepness of the preference term.
        alpha: weight of the likelihood of the chosen answers.
        label_smoothing: share of labels that may be wrong; of "sigmoid" alone.
        loss: form of the preference term.
    """
    if label_smoothing and loss != "sigmoid":
        raise InputError(
            "setting 'label_smoothing': only loss 'sigmoid' has it",
            seen=loss,
            fix="Set it to 0, or loss to sigmoid",
        )
    w_U, l_U = m.seq().unbind(1)
    if loss == "hinge":
        per_pair = relu(1 - beta * (w_U - l_U))
    elif loss == "ipo":
        mean_UK = m.mean()
        per_pair = (mean_UK[:, 0] - mean_UK[:, 1] - 1 / (2 * beta)) ** 2
    else:
        per_pair = smoothed(beta * (w_U - l_U), label_smoothing)
    return Loss(per_pair, metrics=reward_metrics(beta * w_U, beta * l_U)) + alpha * nll(m)


@objective(
    paper="preference-losses",
    unit="pair",
    needs=("logp",),
    rows="pair",
    texts={"gold": "chosen"},
    within={"delta": (0, None), "alpha": (0, None)},
)
def slic(m: Measurements, *, delta: float = 1.0, alpha: float = 1.0) -> Loss:
    """Sequence likelihood calibration: a margin between answers, and a reference answer.

    Args:
        delta: margin between the log-probabilities.
        alpha: weight of the likelihood of the reference answer.
    """
    w_U, l_U, _ = m.seq().unbind(1)
    return Loss(relu(delta - (w_U - l_U)), metrics=reward_metrics(w_U, l_U)) + alpha * nll(m, 2)

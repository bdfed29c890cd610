"""Kahneman-Tversky optimisation: thumbs up and down on single answers, without pairs.

    z0 = max(0, mean over the step of lp(y'|x) - lp_ref(y'|x)),  y' = another row's answer, constant
    good:  w_D (1 - sigmoid(beta (r - z0)))     bad:  w_U (1 - sigmoid(beta (z0 - r)))
                                                                                  arXiv 2402.01306
    apo_zero_unpaired   good: 1 - sigmoid(beta r)    bad: sigmoid(beta r)         arXiv 2408.06266

r = lp(y|x) - lp_ref(y|x); the mean is over all rows. Keep w_D n_D / (w_U n_U) between 1 and 4/3.
Other rows' answers are those of the step, shifted in the order of their contents by as many as rows
share a prompt at most: each is used once, under another prompt, whatever the order in which rows
were drawn. Where one prompt has more than half of the rows, answers to others come more than once;
where all have one, they stay under it. A step needs at least two rows.

Shapes: U rows, K = 2 branches: the row's own answer, the mismatched one.
"""

from __future__ import annotations

import torch

from truing.core.objective import Loss, Measurements, objective
from truing.errors import InputError


@objective(
    paper="preference-losses",
    unit="batch",
    needs=("logp", "ref_logp", "mismatched"),
    rows="unpaired",
    columns={"label": None},
    within={"desirable": (0, None), "undesirable": (0, None)},
)
def kto(
    m: Measurements, *, beta: float = 0.1, desirable: float = 1.0, undesirable: float = 1.0
) -> Loss:
    """Kahneman-Tversky optimisation: thumbs up and down on single answers, without pairs.

    Args:
        beta: strength of the pull towards the reference.
        desirable: weight of good answers.
        undesirable: weight of bad answers.
    """
    if len(m.mask_UKT) < 2:
        raise InputError("KTO needs at least two rows a step", fix="Set batch to 2 or more")
    r_U, mismatched_U = m.ratio().unbind(1)
    z0 = mismatched_U.mean().clamp(min=0).detach()
    good_U = m["label"] > 0
    gap_U = torch.where(good_U, r_U - z0, z0 - r_U)
    weight_U = torch.where(good_U, desirable, undesirable)
    seen = {"kl": z0.expand_as(r_U), "reward": beta * r_U.detach()}
    right = {"accuracy": (gap_U > 0).float().detach()}
    return Loss(weight_U * (1 - (beta * gap_U).sigmoid()), metrics=seen | right)


@objective(
    paper="preference-losses",
    unit="token",
    needs=("logp", "ref_logp"),
    rows="unpaired",
    columns={"label": None},
)
def apo_zero_unpaired(m: Measurements, *, beta: float = 0.1) -> Loss:
    """The terms of APO-zero on single answers: no mismatched answers are needed."""
    reward_U = beta * m.ratio()[:, 0]
    sign_U = 2 * m["label"] - 1
    seen = {"reward": reward_U.detach(), "accuracy": (sign_U * reward_U > 0).float().detach()}
    return Loss((-sign_U * reward_U).sigmoid(), metrics=seen)

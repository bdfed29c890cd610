"""Efficient exact optimisation on pairs: reverse KL from the model's to the smoothed labels.

    q = sigmoid(beta d):   q (log q - log(1-e)) + (1-q) (log(1-q) - log e)      arXiv 2402.00856

d = (lp - lp_ref)(y_w) - (lp - lp_ref)(y_l); e > 0 is the probability that the label is wrong. It
seeks the mode where DPO, a forward KL, covers the mean.

Shapes: U pairs, K = 2 branches.
"""

from __future__ import annotations

import math

from torch.nn.functional import logsigmoid

from truing.core.objective import Loss, Measurements, objective
from truing.errors import InputError
from truing.train.preference.dpo import difference, metrics


@objective(paper="preference-losses", unit="pair", needs=("logp", "ref_logp"), rows="pair")
def exo(m: Measurements, *, beta: float = 0.1, label_smoothing: float = 1e-3) -> Loss:
    """Efficient exact optimisation on pairs: reverse KL from the model's to the smoothed labels.

    Args:
        label_smoothing: probability that a label is wrong, above 0.
    """
    e = label_smoothing
    if not 0 < e <= 0.5:
        raise InputError("setting 'label_smoothing' must be in (0, 0.5]", seen=e)
    z_U = beta * difference(m)
    per_pair = z_U.sigmoid() * (logsigmoid(z_U) - math.log(1 - e))
    per_pair = per_pair + (-z_U).sigmoid() * (logsigmoid(-z_U) - math.log(e))
    return Loss(per_pair, metrics=metrics(m, beta))

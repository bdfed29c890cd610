"""Length-desensitised DPO: tokens beyond the shorter answer's length count less.

    lp'(y) = lp(first min(|y_w|, |y_l|) tokens) + alpha lp(the rest), model and reference alike,
    then -logsigmoid(beta d')                                                     arXiv 2409.06411

alpha = 1 is DPO, alpha = 0 ignores what the longer answer says beyond the other.

Shapes: U pairs, K = 2 branches, T tokens.
"""

from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid

from truing.core.objective import Loss, Measurements, objective
from truing.errors import InputError
from truing.train.preference.dpo import difference, metrics


@objective(paper="preference-losses", unit="pair", needs=("logp", "ref_logp"), rows="pair")
def ld_dpo(m: Measurements, *, beta: float = 0.1, alpha: float = 0.5) -> Loss:
    """Length-desensitised DPO: tokens beyond the shorter answer's length count less.

    Args:
        alpha: weight of tokens beyond the shorter answer's length, 0 to 1.
    """
    if not 0 <= alpha <= 1:
        raise InputError("setting 'alpha' must be in [0, 1]", seen=alpha)
    place_T = torch.arange(m.mask_UKT.shape[-1], device=m.mask_UKT.device)
    shared_U11 = m.length_UK.amin(1)[:, None, None]
    share_UKT = torch.where(place_T < shared_U11, 1.0, alpha)
    weighed = m.having(logp=m.logp_UKT * share_UKT, ref_logp=m.ref_logp_UKT * share_UKT)
    return Loss(-logsigmoid(beta * difference(weighed)), metrics=metrics(m, beta))

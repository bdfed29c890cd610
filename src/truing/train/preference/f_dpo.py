"""DPO under other divergences from the reference than the reverse KL.

    -logsigmoid(beta (s(r_w) - s(r_l))),   r_y = lp(y|x) - lp_ref(y|x)           arXiv 2309.16240
    reverse_kl  s = r                      forward_kl  s = 1 - exp(-r)
    js          s = ln 2 + logsigmoid(r)   alpha       s = (exp((a-1) r) - 1) / (a-1)

Which divergence is kept small decides how much diversity is given up for reward. For alpha -> 1 the
last is the reverse KL, which is DPO. Exponents are clamped at 80.

Shapes: U pairs, K = 2 branches.
"""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor
from torch.nn.functional import logsigmoid

from truing.core.objective import Loss, Measurements, objective
from truing.core.passes.exponentials import exp_up_to, expm1_up_to
from truing.errors import InputError
from truing.train.preference.dpo import metrics

Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]
ALPHA = 0.5


def score(r_UK: Tensor, divergence: Divergence, a: float) -> Tensor:
    """s(r): what takes the place of the log-ratio."""
    if divergence == "forward_kl":
        return 1 - exp_up_to(-r_UK)
    if divergence == "js":
        return math.log(2) + logsigmoid(r_UK)
    if divergence == "alpha" and a != 1:
        return expm1_up_to((a - 1) * r_UK) / (a - 1)
    return r_UK


@objective(paper="preference-losses", unit="pair", needs=("logp", "ref_logp"), rows="pair")
def f_dpo(
    m: Measurements,
    *,
    beta: float = 0.1,
    divergence: Divergence = "forward_kl",
    divergence_alpha: float | None = None,
) -> Loss:
    """DPO under other divergences from the reference than the reverse KL.

    Args:
        beta: strength of the pull towards the reference.
        divergence: "reverse_kl" is DPO itself.
        divergence_alpha: a of the alpha divergence; null takes 0.5. The others have none.
    """
    if divergence_alpha is not None and divergence != "alpha":
        text = "setting 'divergence_alpha': only divergence 'alpha' has it"
        raise InputError(text, seen=divergence, fix="Leave it out, or set divergence to alpha")
    s_UK = score(m.ratio(), divergence, ALPHA if divergence_alpha is None else divergence_alpha)
    return Loss(-logsigmoid(beta * (s_UK[:, 0] - s_UK[:, 1])), metrics=metrics(m, beta))

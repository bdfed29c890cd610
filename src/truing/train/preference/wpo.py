"""Weighted preference optimisation: pairs that the current model would write weigh more.

    w_w w_l (-logsigmoid(beta d)),   w_y = exp(mean_t[log p_t - log sum_v p_v^2])  arXiv 2406.11827

d = (lp - lp_ref)(y_w) - (lp - lp_ref)(y_l). The weights imitate on-policy data; sum_v p_v^2 is the
expected probability of a sampled token, so that an answer drawn from the model weighs about 1.
They are held constant and, as in the authors' later code, not cut off at 1.

Shapes: U pairs, K = 2 branches.
"""

from __future__ import annotations

from torch.nn.functional import logsigmoid

from truing.core.objective import Loss, Measurements, objective
from truing.train.preference.dpo import difference, metrics


@objective(
    paper="preference-losses", unit="pair", needs=("logp", "ref_logp", "sum_p2"), rows="pair"
)
def wpo(m: Measurements, *, beta: float = 0.1) -> Loss:
    """Weighted preference optimisation: pairs that the current model would write weigh more."""
    log_p2 = m.having(log_p2=m["sum_p2"].clamp(min=1e-30).log()).mean("log_p2")
    weight_U = (m.mean() - log_p2).sum(1).exp().detach()
    per_pair = -logsigmoid(beta * difference(m)) * weight_U
    return Loss(per_pair, metrics=metrics(m, beta) | {"on_policy": weight_U})

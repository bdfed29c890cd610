"""Noise contrastive alignment: raise the chosen answer's own likelihood, not only the gap.

    -logsigmoid(beta r_w) - 1/2 logsigmoid(-beta r_w) - 1/2 logsigmoid(-beta r_l)   arXiv 2402.05369

r_y = lp(y|x) - lp_ref(y|x). Rewards are absolute, so that the chosen answer's likelihood does not
fall as under DPO.

Shapes: U pairs, K = 2 branches.
"""

from __future__ import annotations

from torch.nn.functional import logsigmoid

from truing.core.objective import Loss, Measurements, objective
from truing.train.preference.dpo import metrics


@objective(paper="preference-losses", unit="pair", needs=("logp", "ref_logp"), rows="pair")
def nca(m: Measurements, *, beta: float = 0.1) -> Loss:
    """Noise contrastive alignment: raise the chosen answer's own likelihood, not only the gap."""
    w_U, l_U = (beta * m.ratio()).unbind(1)
    per_pair = -logsigmoid(w_U) - 0.5 * logsigmoid(-w_U) - 0.5 * logsigmoid(-l_U)
    return Loss(per_pair, metrics=metrics(m, beta))

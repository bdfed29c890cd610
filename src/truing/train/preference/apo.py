"""Anchored preference optimisation: say whether the chosen answers are better than the model.

    apo_zero   1 - sigmoid(beta r_w) + sigmoid(beta r_l)           chosen better than the model
    apo_down   sigmoid(beta r_w) + 1 - sigmoid(beta (r_w - r_l))   chosen worse    arXiv 2408.06266

r_y = lp(y|x) - lp_ref(y|x). apo_zero raises the chosen and lowers the rejected answer; apo_down
lowers both, the rejected one more.

Shapes: U pairs, K = 2 branches.
"""

from __future__ import annotations

from truing.core.objective import Loss, Measurements, objective
from truing.train.preference.dpo import metrics


@objective(paper="preference-losses", unit="pair", needs=("logp", "ref_logp"), rows="pair")
def apo_zero(m: Measurements, *, beta: float = 0.1) -> Loss:
    """Anchored preference optimisation for chosen answers better than the model's."""
    w_U, l_U = (beta * m.ratio()).unbind(1)
    return Loss(1 - w_U.sigmoid() + l_U.sigmoid(), metrics=metrics(m, beta))


@objective(paper="preference-losses", unit="pair", needs=("logp", "ref_logp"), rows="pair")
def apo_down(m: Measurements, *, beta: float = 0.1) -> Loss:
    """Anchored preference optimisation for chosen answers worse than the model's."""
    w_U, l_U = (beta * m.ratio()).unbind(1)
    return Loss(w_U.sigmoid() + 1 - (w_U - l_U).sigmoid(), metrics=metrics(m, beta))

"""Alignment via optimal transport: chosen beats rejected in distribution, not pair by pair.

    aot           f(beta (sort(a) - sort(b)))   a = lp_w - lp_l, b = lp_ref_w - lp_ref_l
    aot_unpaired  f(beta (sort(r_w) - sort(r_l)))   r_y = lp(y|x) - lp_ref(y|x)     arXiv 2406.05882

f is DPO's logistic, smoothed by e, and values are matched by their rank in the whole step, which
makes one distribution dominate the other stochastically. A step of one pair is DPO.

Shapes: U pairs, K = 2 branches.
"""

from __future__ import annotations

from truing.core.objective import Loss, Measurements, objective
from truing.train.preference.dpo import metrics, smoothed


@objective(paper="preference-losses", unit="batch", needs=("logp", "ref_logp"), rows="pair")
def aot(m: Measurements, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Loss:
    """Optimal transport: the policy's margins against the reference's, by rank."""
    lp_UK, ref_UK = m.seq("logp"), m.seq("ref_logp")
    a_U = (lp_UK[:, 0] - lp_UK[:, 1]).sort().values
    b_U = (ref_UK[:, 0] - ref_UK[:, 1]).sort().values
    return Loss(smoothed(beta * (a_U - b_U), label_smoothing), metrics=metrics(m, beta))


@objective(paper="preference-losses", unit="batch", needs=("logp", "ref_logp"), rows="pair")
def aot_unpaired(m: Measurements, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Loss:
    """Optimal transport: rewards of chosen against those of rejected answers, by rank."""
    r_w_U, r_l_U = m.ratio().unbind(1)
    z_U = beta * (r_w_U.sort().values - r_l_U.sort().values)
    return Loss(smoothed(z_U, label_smoothing), metrics=metrics(m, beta))

"""Self-play preference optimisation: regress each answer's log-ratio onto its win probability.

    (r_w - eta (P_w - 1/2))^2 + (r_l - eta (P_l - 1/2))^2,   eta = 1/beta       arXiv 2405.00675

r_y = lp(y|x) - lp_ref(y|x); P is the probability of winning against the current model. Without
the columns `win_chosen` and `win_rejected` it is 1 and 0, the hard form.

Shapes: U pairs, K = 2 branches.
"""

from __future__ import annotations

from truing.core.batch.columns import share
from truing.core.objective import Loss, Measurements, objective
from truing.train.preference.dpo import metrics


@objective(
    paper="preference-losses",
    unit="pair",
    needs=("logp", "ref_logp"),
    rows="pair",
    columns={"win_chosen": 1.0, "win_rejected": 0.0},
    within={"beta": "(0, inf)"},
)
def sppo(m: Measurements, *, beta: float = 0.1) -> Loss:
    """Self-play preference optimisation: regress log-ratios onto win probabilities."""
    r_w_U, r_l_U = m.ratio().unbind(1)
    per_pair = (r_w_U - (share(m, "win_chosen") - 0.5) / beta) ** 2
    per_pair = per_pair + (r_l_U - (share(m, "win_rejected") - 0.5) / beta) ** 2
    return Loss(per_pair, metrics=metrics(m, beta))

"""Identity preference optimisation: regress the log-ratio margin onto a finite target.

    (r_w/|y_w| - r_l/|y_l| - 1/(2 beta))^2         arXiv 2310.12036

r_y = lp(y|x) - lp_ref(y|x). Unlike DPO it does not push deterministic preferences to infinity. The
authors confirmed that log-ratios are divided by the length of their answer; `length_normalise`
off gives the form of the paper's text, whose scale is about a hundred times another.

Shapes: U pairs, K = 2 branches.
"""

from __future__ import annotations

from truing.core.objective import Loss, Measurements, objective
from truing.train.preference.dpo import metrics


@objective(
    paper="preference-losses",
    unit="pair",
    needs=("logp", "ref_logp"),
    rows="pair",
    within={"beta": "(0, inf)"},
)
def ipo(m: Measurements, *, beta: float = 0.1, length_normalise: bool = True) -> Loss:
    """Identity preference optimisation: regress the log-ratio margin onto a finite target.

    Args:
        beta: strength of the pull towards the reference; the target is 1 / (2 beta).
        length_normalise: divide each log-ratio by the length of its answer.
    """
    r_UK = m.ratio() / m.length_UK if length_normalise else m.ratio()
    per_pair = (r_UK[:, 0] - r_UK[:, 1] - 1 / (2 * beta)) ** 2
    return Loss(per_pair, metrics=metrics(m, beta))

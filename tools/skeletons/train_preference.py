"""My method: what it does for a user, in one sentence.

    -logsigmoid(beta d),   d = r_w - r_l                                          arXiv 0000.00000

r_y = lp(y|x) - lp_ref(y|x), w = chosen, l = rejected. Say what every symbol means, which paper it
is from (title, arXiv id), and where this differs from the paper and why.

Shapes: U pairs, K = 2 branches.
"""

from __future__ import annotations

from torch.nn.functional import logsigmoid

from truing.core.objective import Loss, Measurements, objective, reward_metrics


@objective(paper="my-method", unit="pair", needs=("logp", "ref_logp"), rows="pair")
def my_method(m: Measurements, *, beta: float = 0.1) -> Loss:
    """My method: what it does for a user, in one sentence.

    Args:
        beta: strength of the pull towards the reference.
    """
    r_UK = beta * m.ratio()
    return Loss(
        -logsigmoid(r_UK[:, 0] - r_UK[:, 1]), metrics=reward_metrics(r_UK[:, 0], r_UK[:, 1])
    )

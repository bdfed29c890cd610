"""My method: what it does for a user, in one sentence.

    - sum_t m_t log p(y_t | x, y_<t) / sum_t m_t                                  arXiv 0000.00000

m is 1 on the tokens of the answers, their end token included. Say what every symbol means, which
paper it is from (title, arXiv id), and where this differs from the paper and why.

Shapes: U rows, K = 1 branch, T answer tokens.
"""

from __future__ import annotations

from truing.core.objective import Loss, Measurements, objective


@objective(paper="my-method", unit="token", needs=("logp",), rows="example")
def my_method(m: Measurements) -> Loss:
    """My method: what it does for a user, in one sentence."""
    return Loss(-m.logp_UKT, m.mask_UKT, {"logp": m.mean()[:, 0].detach()})

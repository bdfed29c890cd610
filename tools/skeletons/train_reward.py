"""My method: what it does for a user, in one sentence.

    -logsigmoid(s_w - s_l) + centring (s_w + s_l)^2                               arXiv 0000.00000

s is a linear head on the last hidden state of an answer's last token, w = chosen, l = rejected. Say
what every symbol means, which paper it is from (title, arXiv id), and where this differs from the
paper and why.

Shapes: U pairs, K = 2 branches.
"""

from __future__ import annotations

from torch.nn.functional import logsigmoid

from truing.core.objective import Loss, Measurements, objective, reward_metrics


@objective(paper="my-method", unit="pair", needs=("scores",), rows="pair")
def my_method(m: Measurements, *, centring: float = 0.01) -> Loss:
    """My method: what it does for a user, in one sentence.

    Args:
        centring: weight of the squared sum of both scores, which keeps them near 0.
    """
    w_U, l_U = m.last("scores").unbind(1)
    per_pair_U = -logsigmoid(w_U - l_U) + centring * (w_U + l_U).square()
    return Loss(per_pair_U, metrics=reward_metrics(w_U, l_U))

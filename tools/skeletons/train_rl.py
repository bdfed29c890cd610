"""My method: what it does for a user, in one sentence.

    A_i = R_i - mean of R_j over j != i                                           arXiv 0000.00000
    loss = mean over tokens of -min(ratio A, clip(ratio, 1 - e, 1 + e) A)

ratio = pi / pi_old of a token. Say what every symbol means, which paper it is from (title, arXiv
id), and where this differs from the paper and why.

Shapes: U groups, K answers, T tokens.
"""

from __future__ import annotations

from torch import Tensor

from truing.core.objective import Loss, Measurements
from truing.core.online import Update, by_token, clipped, online, weighed


def advantages(reward_UK: Tensor, there_UK: Tensor) -> Tensor:
    """How much better each answer is than the others of its group, [U, K]; 0 where none is."""
    others_U1 = (there_UK.sum(-1, keepdim=True) - 1).clamp(min=1)
    total_U1 = (reward_UK * there_UK).sum(-1, keepdim=True)
    return (reward_UK - (total_U1 - reward_UK) / others_U1) * there_UK


@online(paper="my-method", least=2)
def my_method(r: Measurements, *, clip_low: float = 0.2, clip_high: float = 0.2) -> Update:
    """My method: what it does for a user, in one sentence.

    Args:
        clip_low: how far below 1 the ratio of new to old probability counts.
        clip_high: how far above 1.
    """

    def loss(m: Measurements) -> Loss:
        return by_token(clipped(m, clip_low, clip_high), m)

    return weighed(advantages(r["reward"], r.there_UK), loss)

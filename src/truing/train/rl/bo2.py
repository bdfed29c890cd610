"""Best of two: the model imitates the better of its own answers, again and again.

    - sum_{u, t} m_t log pi(y_t^+ | x_u, y_<t^+) / sum_{u, t} m_t
    y^+ = the answer of a group with the largest reward

over the groups whose rewards differ; others make no pair, are counted and weigh nothing. Of equal
largest ones the first is taken. It is the loss without a contrast beside online DPO: neither a
reference nor the worse answer is looked at, so that it tells what of a difference between online
and offline training is the loss's. Its offline side is `train/sft` on the chosen answers of pairs.

Source: hypothesis 4 of "Understanding the performance gap between online and offline alignment
algorithms", arXiv 2405.08448.

Shapes: U groups, K answers, T tokens.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import one_hot

from truing.core.objective import Loss, Measurements
from truing.core.online import Update, by_token, online
from truing.train.rl.online_dpo import extremes


def better(m: Measurements) -> Tensor:
    """1.0 for the best answer of each group whose rewards differ, [U, K]."""
    best_UK = one_hot(m["best"].long(), m.mask_UKT.shape[1]).to(m.mask_UKT.dtype)
    return best_UK * m["paired"][:, None]


@online(paper="online-offline-gap", least=2, tempered=False)
def bo2(r: Measurements, *, answers: int = 2, temperature: float = 1.0) -> Update:
    """Best of two: the model imitates the better of its own answers, again and again."""
    pairs = extremes(r)

    def loss(m: Measurements) -> Loss:
        return by_token(-m["logp"], m, better(m))

    return Update(pairs, loss, active_U=pairs["paired"] > 0)

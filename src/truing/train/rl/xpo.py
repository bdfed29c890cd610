"""Exploratory preference optimisation: online DPO with a bonus for leaving the reference.

    pair = (answer of the policy, answer of the reference), ranked by reward
    loss = -logsigmoid(beta d) + alpha lp(answer of the reference)                arXiv 2405.21046

d as in `online_dpo`. The second term is the paper's optimism: lowering the likelihood of what the
reference says moves mass to answers not seen yet. Each of the policy's answers meets one of the
reference. Pairs of equal reward keep the second term alone.

Shapes: U groups, K = 2 answers, T tokens.
"""

from __future__ import annotations

from truing.core.objective import Loss, Measurements
from truing.core.online import Update, online
from truing.train.rl.online_dpo import extremes, pair_loss


@online(paper="preference-losses", needs=("ref_logp",), opponent="reference")
def xpo(
    r: Measurements,
    *,
    beta: float = 0.1,
    alpha: float = 1e-5,
    answers: int = 1,
    temperature: float = 0.9,
) -> Update:
    """Exploratory preference optimisation: online DPO with a bonus for leaving the reference.

    Args:
        beta: strength of the pull towards the reference.
        alpha: weight of the bonus.
    """

    def loss(m: Measurements) -> Loss:
        theirs_UK = (1 - m["own"]) * m.there_UK
        bonus_U = (m.seq() * theirs_UK).sum(1) / theirs_UK.sum(1)
        return pair_loss(m, beta) + alpha * Loss(bonus_U)

    pairs = extremes(r)
    return Update(pairs, loss, active_U=None if alpha else pairs["paired"] > 0)

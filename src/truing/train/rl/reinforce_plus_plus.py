"""REINFORCE++: no critic and no group; the return to go of each token, whitened over the batch.

    r_t = -beta (log pi(y_t) - log pi_ref(y_t)) + [t is the last] R               arXiv 2501.03262
    A_t = whiten(sum of r_s over s >= t),   whiten(x) = (x - mean) / sqrt(var + 1e-8)
    loss = mean over all tokens of -min(ratio_t A_t, clip(ratio_t, 1 - e, 1 + e) A_t)

Mean and variance (n - 1) are over all tokens of the batch. With `baseline` the mean of the group is
taken off R first ("REINFORCE++-baseline"), which needs groups. R is the reward as it is: the paper
clips it, which `missing_end` and a bounded reward make unnecessary here.

Shapes: U groups, K answers, T tokens.
"""

from __future__ import annotations

from truing.core.objective import Loss, Measurements
from truing.core.online import (
    Update,
    by_token,
    clip_fraction,
    clipped,
    online,
    placed,
    watched,
    weighed,
)
from truing.core.rl.advantages import group_advantage, kl_tokens, to_go, whiten
from truing.errors import InputError


@online(paper="preference-losses", needs=("ref_logp",))
def reinforce_plus_plus(
    r: Measurements,
    *,
    beta: float = 0.01,
    clip_ratio: float = 0.2,
    baseline: bool = False,
    answers: int = 1,
) -> Update:
    """REINFORCE++: the return to go of each token, whitened over the batch.

    Args:
        beta: strength of the pull towards the reference, at each token's reward.
        baseline: take the mean of the group off the reward first.
    """
    if baseline and r.mask_UKT.shape[1] < 2:
        raise InputError(
            "setting 'answers' must be at least 2 with a baseline, the mean of a group",
            seen=answers,
        )
    reward_UK = group_advantage(r["reward"], r.there_UK, "none") if baseline else r["reward"]
    reward_UKT = placed(r, reward_UK)
    if beta:
        reward_UKT = reward_UKT - beta * kl_tokens(r["logp"], r["ref_logp"], "k1") * r.mask_UKT

    def loss(m: Measurements) -> Loss:
        made = by_token(clipped(m, clip_ratio, clip_ratio), m)
        return watched(made, clip_fraction=clip_fraction(m, clip_ratio, clip_ratio))

    return weighed(whiten(to_go(reward_UKT, r.mask_UKT), r.mask_UKT), loss)

"""Clipped importance sampling: the weight of a token is capped, its gradient never lost.

    w_t = min(pi(y_t) / pi_old(y_t), cap), held constant                          arXiv 2506.13585
    loss = mean over all tokens of -w_t A_i log pi(y_t)

A_i as in GRPO. PPO's clipping drops the gradient of tokens whose probability has moved far, often
the rare ones that open a line of thought; here they keep a gradient of bounded size.

Shapes: U groups, K answers, T tokens.
"""

from __future__ import annotations

from truing.core.advantages import group_advantage
from truing.core.objective import Loss, Measurements
from truing.core.online import Update, advantages, by_token, log_ratio, online, watched, weighed


@online(paper="preference-losses", least=2)
def cispo(r: Measurements, *, cap: float = 5.0) -> Update:
    """Clipped importance sampling: the weight of a token is capped, its gradient never lost.

    Args:
        cap: largest weight of a token.
    """

    def loss(m: Measurements) -> Loss:
        ratio_UKT = log_ratio(m).detach().exp()
        per_UKT = -ratio_UKT.clamp(max=cap) * advantages(m) * m.logp_UKT
        capped_UK = ((ratio_UKT > cap) * m.mask_UKT).sum(-1) / m.length_UK.clamp(min=1)
        return watched(by_token(per_UKT, m), clip_fraction=capped_UK)

    return weighed(group_advantage(r["reward"], r.there_UK), loss)

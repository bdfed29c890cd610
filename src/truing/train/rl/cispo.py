"""Weights in place of clipping: a token far from where it was drawn fades, and is never cut off.

    ratio_t = pi(y_t) / pi_old(y_t)
    cispo  w_t = min(ratio_t, cap), held constant                                 arXiv 2506.13585
           loss = mean over all tokens of -w_t A_i log pi(y_t)
    sapo   f_t = 4 / tau sigmoid(tau (ratio_t - 1)),  tau by the sign of A_i
           loss = mean over answers of the mean of -f_t A_i over their tokens

A_i as in GRPO. PPO's clipping drops the gradient of tokens whose probability has moved far, often
the rare ones that open a line of thought; cispo leaves them a gradient of bounded size, sapo one
that shrinks smoothly with the distance, in both directions. At ratio 1 either has REINFORCE's.

Shapes: U groups, K answers, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from truing.core.advantages import group_advantage
from truing.core.objective import Loss, Measurements
from truing.core.online import (
    Update,
    advantages,
    by_answer,
    by_token,
    log_ratio,
    online,
    watched,
    weighed,
)
from truing.errors import InputError


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


def gated(m: Measurements, tau_positive: float, tau_negative: float) -> Tensor:
    """-4 / tau sigmoid(tau (ratio - 1)) A of each token, [U, K, T]."""
    a_UKT = advantages(m)
    tau_UKT = torch.where(a_UKT > 0, tau_positive, tau_negative)
    # exp of 20 has long closed the gate, and keeps the gradient finite.
    ratio_UKT = log_ratio(m).clamp(max=20.0).exp()
    return -4 / tau_UKT * (tau_UKT * (ratio_UKT - 1)).sigmoid() * a_UKT


@online(paper="preference-losses", least=2)
def sapo(r: Measurements, *, tau_positive: float = 1.0, tau_negative: float = 1.05) -> Update:
    """Soft adaptive policy optimisation: a smooth gate where GRPO clips.

    Args:
        tau_positive: how fast the gate closes with the distance, for positive advantages.
        tau_negative: the same for all others; larger, since these unsettle training more.
    """
    for name, tau in (("tau_positive", tau_positive), ("tau_negative", tau_negative)):
        if not tau > 0:
            raise InputError("must be above 0", where=f"sapo setting {name!r}", seen=tau)

    def loss(m: Measurements) -> Loss:
        return by_answer(gated(m, tau_positive, tau_negative), m)

    return weighed(group_advantage(r["reward"], r.there_UK), loss)

"""Weights in place of clipping: a token far from where it was drawn fades, and is never cut off.

    ratio_t = pi(y_t) / pi_old(y_t)
    cispo  w_t = min(ratio_t, cap), held constant                                 arXiv 2506.13585
           loss = mean over all tokens of -w_t A_i log pi(y_t)
    sapo   f_t = 4 / tau sigmoid(tau (ratio_t - 1)),  tau by the sign of A_i
           loss = mean over answers of the mean of -f_t A_i over their tokens
    vespo  w_i = exp(sum_t log ratio_t)
           phi_i = w_i^k exp(lam (1 - w_i)), held constant;  k and lam by the sign of A_i
           loss = mean over all tokens of -phi_i A_i log pi(y_t)

A_i as in GRPO. PPO's clipping drops the gradient of tokens whose probability has moved far, often
the rare ones that open a line of thought; cispo leaves them a gradient of bounded size, sapo one
that shrinks smoothly with the distance, in both directions. vespo weighs the tokens of an answer by
the ratio of the whole: phi is 1 at ratio 1, greatest at w = k / lam, and falls to 0 either way. At
ratio 1 the gradient of all three is REINFORCE's.

"All tokens", where cispo and vespo take the mean, are those of one update: with one minibatch a
rollout, the default, those of the whole generation batch, by which the usual form divides.

Shapes: U groups, K answers, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

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
from truing.core.passes.exponentials import FARTHEST, exp_up_to
from truing.core.rl.advantages import group_advantage


@online(paper="preference-losses", least=2, within={"cap": "(0, inf)"})
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
    ratio_UKT = exp_up_to(log_ratio(m), FARTHEST)  # the gate has long closed by then
    return -4 / tau_UKT * (tau_UKT * (ratio_UKT - 1)).sigmoid() * a_UKT


@online(
    paper="preference-losses",
    least=2,
    within={"tau_positive": "(0, inf)", "tau_negative": "(0, inf)"},
)
def sapo(r: Measurements, *, tau_positive: float = 1.0, tau_negative: float = 1.05) -> Update:
    """Soft adaptive policy optimisation: a smooth gate where GRPO clips.

    Args:
        tau_positive: how fast the gate closes with the distance, for positive advantages.
        tau_negative: the same for all others; larger, since these unsettle training more.
    """

    def loss(m: Measurements) -> Loss:
        return by_answer(gated(m, tau_positive, tau_negative), m)

    return weighed(group_advantage(r["reward"], r.there_UK), loss)


def answer_weight(
    m: Measurements, k_positive: float, lam_positive: float, k_negative: float, lam_negative: float
) -> Tensor:
    """phi = exp(lam + k log w - lam w) of each answer, w the ratio of the whole; [U, K], held."""
    log_UK = log_ratio(m).detach().sum(-1).clamp(max=FARTHEST)
    fit_UK = (advantages(m).sum(-1) >= 0).float()
    k_UK = k_negative + (k_positive - k_negative) * fit_UK
    lam_UK = lam_negative + (lam_positive - lam_negative) * fit_UK
    return (k_UK * log_UK - lam_UK * torch.expm1(log_UK)).exp()


@online(
    paper="preference-losses",
    least=2,
    within={
        "k_positive": (0, None),
        "lam_positive": (0, None),
        "k_negative": (0, None),
        "lam_negative": (0, None),
    },
)
def vespo(
    r: Measurements,
    *,
    k_positive: float = 2.0,
    lam_positive: float = 3.0,
    k_negative: float = 3.0,
    lam_negative: float = 2.0,
) -> Update:
    """Answers weighed by a smooth function of their whole ratio, which fades on both sides.

    Args:
        k_positive: how fast the weight falls below ratio 1, for advantages of 0 and more.
        lam_positive: how fast it falls above.
        k_negative: how fast the weight falls below ratio 1, for negative advantages.
        lam_negative: how fast it falls above.
    """

    def loss(m: Measurements) -> Loss:
        phi_UK = answer_weight(m, k_positive, lam_positive, k_negative, lam_negative)
        made = by_token(-phi_UK[..., None] * advantages(m) * m.logp_UKT, m)
        return watched(made, answer_weight=phi_UK)

    return weighed(group_advantage(r["reward"], r.there_UK), loss)

"""Proximal policy optimisation: a critic says what was to be expected, and steps stay short.

    r_t = -beta (log pi_old(y_t) - log pi_ref(y_t)) + [t is the last] R
    delta_t = r_t + gamma V_{t+1} - V_t,   A_t = delta_t + gamma lam A_{t+1},   ret_t = A_t + V_t
    policy  -min(ratio_t A_t, clip(ratio_t, 1 - e, 1 + e) A_t),  A whitened over all tokens
    value   max((V - ret)^2, (clip(V, V_old - e_v, V_old + e_v) - ret)^2) / 2
    loss = mean over tokens of policy + vf value                                  arXiv 1707.06347

V_t is the critic at the state before token t. Given as `critic`, it is a model of its own: a reward
model gives backbone and head, as the papers on language models have it (arXiv 1909.08593,
2203.02155), an earlier critic goes on, another model begins with a zero head. Without one it is a
linear layer on the policy's own trunk, zero at first or the model's own where it was trained with
one, and comes back with the model as extra tensors: what fits on small machines. One of its own is
kept beside the result: `truing store export KEY/critic FOLDER` writes it, or RUN/STEP/critic; after
a plain call it lies where the model's files do. `critic_rollouts` lets the critic learn alone at
first, `critic_rate` faster than the policy.

Shapes: U groups, K answers, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from truing.core.objective import Loss, Measurements, State
from truing.core.online import (
    Update,
    by_token,
    clip_fraction,
    clipped,
    online,
    placed,
    value_loss,
    watched,
)
from truing.core.rl.advantages import gae, kl_tokens, whiten

EQUAL = 1e-5  # of the largest return: a deviation that is rounding


def token_rewards(r: Measurements, score_UK: Tensor, beta: float) -> Tensor:
    """Scores on last tokens, and at every token beta times its k1 divergence off, [U, K, T]."""
    made_UKT = placed(r, score_UK)
    if not beta:
        return made_UKT
    return made_UKT - beta * kl_tokens(r["logp"], r["ref_logp"], "k1") * r.mask_UKT


def explained(value_UKT: Tensor, return_UKT: Tensor, mask_UKT: Tensor) -> Tensor:
    """Share of the returns' variance that the critic explains; 0 for a constant, 1 for all.

    0 too where the returns are one number but for rounding: there is nothing to explain.
    """
    there = mask_UKT > 0
    left, whole = (return_UKT - value_UKT)[there], return_UKT[there]
    var = whole.var(correction=0)
    share = 1 - left.var(correction=0) / var.clamp(min=1e-24)
    return torch.where(var.sqrt() > EQUAL * whole.abs().max(), share, 0.0)


def counted(state: State | None) -> tuple[int, State]:
    """Rollouts before this one, and the state with this one counted."""
    seen = (state or {}).get("rollouts", torch.zeros(()))
    return int(seen), {**(state or {}), "rollouts": seen + 1}


def critic_loss(clip_value: float) -> Callable[[Measurements], Loss]:
    """The critic's loss alone, over the policy's own tokens."""

    def loss(m: Measurements) -> Loss:
        per_UKT = value_loss(m, clip_value)
        mean_UK = (per_UKT * m.mask_UKT).sum(-1).detach() / m.length_UK.clamp(min=1)
        return watched(by_token(per_UKT, m, m["own"]), value_loss=mean_UK[m["own"] > 0])

    return loss


def with_critic(
    clip_ratio: float, vf: float, critic: Callable[[Measurements], Loss]
) -> Callable[[Measurements], Loss]:
    """The clipped surrogate and `vf` times the critic's loss."""

    def loss(m: Measurements) -> Loss:
        made = by_token(clipped(m, clip_ratio, clip_ratio), m)
        made = watched(made, clip_fraction=clip_fraction(m, clip_ratio, clip_ratio))
        return made + vf * critic(m)

    return loss


@online(
    paper="preference-losses",
    needs=("ref_logp", "values"),
    within={"gamma": (0, 1), "lam": (0, 1)},
)
def ppo(
    r: Measurements,
    state: State | None = None,
    *,
    beta: float = 0.05,
    gamma: float = 1.0,
    lam: float = 0.95,
    clip_ratio: float = 0.2,
    clip_value: float = 0.2,
    vf: float = 0.1,
    critic_rollouts: int = 0,
    answers: int = 1,
    passes: int = 4,
    temperature: float = 0.7,
) -> Update:
    """Proximal policy optimisation: a critic says what was to be expected, and steps stay short.

    Args:
        beta: strength of the pull towards the reference, at each token's reward.
        gamma: what a reward one token later is worth.
        lam: how far rewards are believed rather than the critic.
        clip_ratio: how far from 1 the ratio of new to old probability counts.
        clip_value: how far values may move in the critic's loss; 0 for any distance.
        vf: weight of the critic's loss.
        critic_rollouts: rollouts at first from which the critic alone learns.
    """
    done, state = counted(state)
    advantage_UKT = gae(
        token_rewards(r, r["reward"], beta), r["values"], r.mask_UKT, gamma=gamma, lam=lam
    )
    return_UKT = advantage_UKT + r["values"]
    critic = critic_loss(clip_value)
    seen = {"explained": explained(r["values"], return_UKT, r.mask_UKT)}
    tensors = {"advantage": whiten(advantage_UKT, r.mask_UKT), "returns": return_UKT}
    alone = done < critic_rollouts
    loss = critic if alone else with_critic(clip_ratio, vf, critic)
    return Update(tensors, loss, metrics=seen, state=state, head_only=alone)

"""SALMON's RL: PPO against a reward model that is told principles, which are chosen now.

    R_t = -beta kl_t + [t is the last] (r(x, y | P) - missing_end [no stop token]
                                        + bonus min(|y| / T_max, cap))
    kl_t = max(l, 0) ("k1"), or exp(-l) + l - 1 ("k3");   l = log pi_old(y_t) - log pi_ref(y_t)
    A_t = sum_{s>=t} scale R_s - V_t  (GAE with gamma = lambda = 1),   ret_t = A_t + V_t
    loss = mean max(-A ratio, -A clip(ratio, 1 - e, 1 + e)) + vf value;  A whitened

Input `reward_model` is one from train/salmon, `principles` are those to reward by: other ones, or
the same ones edited, give another policy without new preferences. For each visit to a prompt
`draw` of them are drawn and told with `always` (see the reward `salmon_reward`). Without a
`reward_model` other rewards do. T_max is `max_tokens`. `reward_scale` 0 makes of each R_t
(R_t - mean) / deviation + mean over the batch in place of scaling it.

Source: arXiv 2310.05910. Differences: the score lies on the true last token, not on the last place
of the padding, so that no padding carries reward; whitening (population variance, 1e-8) is over
the whole answers x T_max as there, where the places beyond an answer are 0. Losses are means over
tokens. Clamped k1 is biased, never below 0. For the
critic see ppo: the paper's is the reward model, given as `critic`.

Shapes: U groups, K answers, T tokens.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from truing.core.objective import Measurements, State
from truing.core.online import Update, online, placed
from truing.core.rl.advantages import all_equal, gae, kl_tokens
from truing.train.rl.ppo import counted, critic_loss, explained, with_critic

ALWAYS = [
    "The answer does not praise itself or say how good it is.",
    "The answer does what was asked instead of listing what speaks for and against it.",
    "The answer stays with the question and adds nothing that was not asked for.",
]


def token_rewards(
    r: Measurements, beta: float, kl: str, bonus: float, cap: float, longest: int
) -> Tensor:
    """R_t, [U, K, T]; its sum is the reward, the bonus, and what the divergence costs."""
    score_UK = r["reward"] + bonus * (r.length_UK / longest).clamp(max=cap)
    made_UKT = placed(r, score_UK)
    if not beta:
        return made_UKT
    kind = "k1" if kl == "k1" else "k3"
    kl_UKT = kl_tokens(r["logp"], r["ref_logp"], kind).clamp(min=0.0)
    return made_UKT - beta * kl_UKT * r.mask_UKT


def whitened(value_UKT: Tensor, r: Measurements, longest: int, *, shift: bool = True) -> Tensor:
    """(x - mean) / sqrt(var + 1e-8) over answers x `longest`, 0 beyond an answer's end.

    Without `shift` the mean is added again. 0 where all are equal: rounding is not blown up.
    """
    value_UKT = value_UKT * r.mask_UKT
    n = r.there_UK.sum() * longest
    mean = value_UKT.sum() / n
    off_UKT = (value_UKT - mean) * r.mask_UKT
    var = (off_UKT.square().sum() + mean**2 * (n - r.mask_UKT.sum())) / n
    made_UKT = off_UKT / (var + 1e-8).sqrt()
    if all_equal(value_UKT, r.mask_UKT) and n == r.mask_UKT.sum():
        made_UKT = torch.zeros_like(value_UKT)
    return (made_UKT if shift else made_UKT + mean) * r.mask_UKT


@online(
    paper="salmon",
    needs=("ref_logp", "values"),
    follows="salmon_reward",
    within={"draw": (0, None), "reward_scale": (0, None), "bonus": (0, None)},
)
def salmon_ppo(
    r: Measurements,
    state: State | None = None,
    *,
    beta: float = 0.01,
    kl: Literal["k1", "k3"] = "k1",
    draw: int = 3,
    always: list[str] = ALWAYS,
    reward_scale: float = 10.0,
    bonus: float = 5.0,
    cap: float = 0.8,
    clip_ratio: float = 0.2,
    clip_value: float = 0.2,
    vf: float = 0.1,
    critic_rollouts: int = 0,
    missing_end: float = 6.0,
    answers: int = 1,
    max_tokens: int = 64,
    passes: int = 2,
    minibatches: int = 2,
    temperature: float = 0.7,
) -> Update:
    """SALMON's RL: PPO against a reward model that is told principles, which are chosen now.

    Args:
        beta: strength of the pull towards the reference, at each token's reward.
        kl: how the divergence is estimated; both are never below 0.
        draw: drawn for each visit to a prompt; 0 tells all.
        always: sentences told besides, which keep the reward from being hacked.
        reward_scale: what rewards are multiplied by; 0 whitens them instead, their mean kept.
        bonus: times the share of `max_tokens` that an answer takes, up to `cap`.
        cap: share of `max_tokens` from which longer answers get no more.
        clip_ratio: how far from 1 the ratio of new to old probability counts.
        clip_value: how far values may move in the critic's loss; 0 for any distance.
        vf: weight of the critic's loss.
        critic_rollouts: rollouts at first from which the critic alone learns.
    """
    done, state = counted(state)
    reward_UKT = token_rewards(r, beta, kl, bonus, cap, max_tokens)
    plain = reward_scale * reward_UKT
    reward_UKT = plain if reward_scale else whitened(reward_UKT, r, max_tokens, shift=False)
    advantage_UKT = gae(reward_UKT, r["values"], r.mask_UKT)
    return_UKT = advantage_UKT + r["values"]
    critic = critic_loss(clip_value)
    seen = {"explained": explained(r["values"], return_UKT, r.mask_UKT)}
    tensors = {"advantage": whitened(advantage_UKT, r, max_tokens), "returns": return_UKT}
    alone = done < critic_rollouts
    loss = critic if alone else with_critic(clip_ratio, vf, critic)
    return Update(tensors, loss, metrics=seen, state=state, head_only=alone)

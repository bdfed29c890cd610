"""PPO-max: PPO with each trick of "Secrets of RLHF" a switch, and monitors that see collapse.

    R~ = clip((R - mu) / sigma, -d, d)    mu, sigma over all rewards so far, this batch included
    r_t = -beta (log pi_old - log pi_ref) + [t is the last] R~;  A, ret by GAE, as in `ppo`
    policy  max(-A ratio, -A clip(ratio, 1 - e, 1 + e));   value, clipped, as in `ppo`
    loss = policy + vf value + w |H - H_target| + ptx NLL(given answers)          arXiv 2307.04964

The twelve tricks: token KL (`beta`), importance sampling (`importance`), entropy bonus (`entropy`),
reward scaling and normalisation with clipping (`reward`, `clip_reward`), advantage normalisation
and clipping (`clip_advantage`), value clipping (`clip_value`), critic (input `critic`: the reward
model, the model before its training with a zero head, or an earlier critic; `critic_rollouts` of
it alone before any policy step, `critic_rate`), policy (the model given: train it by sft first),
GAE (`lam`), clipped surrogate (`clip_ratio`), gradient clipping (`clip`). PPO-ptx needs rows with
the column `completion` and `ptx` above 0. But for that the defaults are the paper's PPO-max, which
begins the critic as the reward model: give that as `critic`. Without one a head on the policy's own
trunk has to do. In an environment R~ of the whole episode is paid at its end.

Differences: a new head is zero, not random; advantages are normalised over the rollout, not the
minibatch, and H - H_target is taken token by token, which is the same on one side of the
target, so that no split of the batch can change a step. A group of several answers is allowed.

Monitors: reward and its deviation and largest value, kl, length, perplexity of the policy's own
answers under itself and under the reference. `alarm` is 1 where KL per token exceeds 0.3 nats or
answers are half as long again as in the first rollout, since the reward cannot tell collapse.

Shapes: U groups, K answers, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from truing.core.advantages import gae, kl_tokens, moments, sigma, whiten
from truing.core.objective import Loss, Measurements, State
from truing.core.online import (
    Update,
    advantages,
    by_token,
    clip_fraction,
    clipped,
    online,
    watched,
)
from truing.train.rl.ppo import counted, critic_loss, explained, token_rewards

Shape = Literal["raw", "scaled", "normalised"]
ALARM_KL, ALARM_LENGTH = 0.3, 1.5
ENTROPY = 35.0  # above the logarithm of any vocabulary: more entropy is always rewarded


def shaped(reward: Tensor, running: State, how: Shape, clip: float) -> Tensor:
    """Rewards as they are, over sigma, or centred and over sigma; the last clipped to +-clip."""
    if how == "raw":
        return reward
    spread = sigma(running).to(reward)
    spread = torch.where(spread > 0, spread, 1.0)  # equal rewards so far: nothing to scale by
    if how == "scaled":
        return reward / spread
    z = (reward - running["mean"].to(reward)) / spread
    return z.clamp(-clip, clip) if clip else z


def monitors(r: Measurements, own_UKT: Tensor, state: State) -> dict[str, Tensor]:
    """What shows collapse, over the policy's own answers; "first_length" is kept in the state."""
    own_UK = r["own"] > 0
    count = own_UKT.sum().clamp(min=1)
    reward, length = r["reward"][own_UK], r.length_UK[own_UK].mean()
    first = state.setdefault("first_length", length.detach().cpu())
    seen = {
        "reward_std": reward.std() if len(reward) > 1 else torch.zeros(()),
        "reward_max": reward.max(),
        "perplexity": (-(r["logp"] * own_UKT).sum() / count).exp(),
        "alarm": (length > ALARM_LENGTH * first.to(length)).float(),
    }
    if "ref_logp" in r:
        kl = (kl_tokens(r["logp"], r["ref_logp"]) * own_UKT).sum() / count
        seen["perplexity_ref"] = (-(r["ref_logp"] * own_UKT).sum() / count).exp()
        seen["alarm"] = torch.maximum(seen["alarm"], (kl > ALARM_KL).float())
    return seen


def normalised(advantage_UKT: Tensor, own_UKT: Tensor, clip: float) -> Tensor:
    """Advantages of the policy's own tokens; with `clip` of unit deviation, none beyond it."""
    if clip:
        advantage_UKT = whiten(advantage_UKT, own_UKT, unbiased=False, eps=1e-6).clamp(-clip, clip)
    return advantage_UKT * own_UKT


def policy_loss(
    clip_ratio: float, importance: bool, entropy: float, ptx: float
) -> Callable[[Measurements], Loss]:
    """The policy's loss: the surrogate, the entropy term, the likelihood of given answers."""
    reach = clip_ratio or float("inf")

    def loss(m: Measurements) -> Loss:
        policy_UKT = clipped(m, reach, reach) if importance else -advantages(m) * m.logp_UKT
        made = by_token(policy_UKT, m, m["own"])
        made = watched(made, clip_fraction=clip_fraction(m, reach, reach))
        if entropy:
            made = made + entropy * by_token((m["entropy"] - ENTROPY).abs(), m, m["own"])
        return made + ptx * by_token(-m.logp_UKT, m, 1 - m["own"]) if ptx else made

    return loss


@online(paper="secrets-ppo-max", needs=("ref_logp", "values", "entropy"), given="completion")
def ppo_max(
    r: Measurements,
    state: State | None = None,
    *,
    beta: float = 0.02,
    reward: Shape = "normalised",
    clip_reward: float = 10.0,
    clip_advantage: float = 0.0,
    importance: bool = True,
    clip_ratio: float = 0.2,
    clip_value: float = 0.2,
    vf: float = 1.0,
    entropy: float = 0.0,
    ptx: float = 0.0,
    lam: float = 0.95,
    critic_rollouts: int = 2,
    answers: int = 1,
    batch: int = 128,
    minibatches: int = 4,
    temperature: float = 0.8,
    top_p: float = 0.9,
    repetition_penalty: float = 1.1,
    critic_rate: float = 3.0,
) -> Update:
    """PPO-max: PPO with each trick a switch, and monitors that see collapse.

    Args:
        beta: strength of the pull towards the reference, at each token's reward.
        reward: rewards as they are, divided by their running deviation, or normalised by it.
        clip_reward: largest normalised reward; 0 for any.
        clip_advantage: largest advantage after normalising them (population variance, 1e-6); 0
            leaves them as they are.
        importance: weigh by the ratio to the policy that drew the answers.
        clip_ratio: how far from 1 that ratio counts; 0 for any distance.
        clip_value: how far values may move in the critic's loss; 0 for any distance.
        vf: weight of the critic's loss.
        entropy: weight of the entropy term, whose target is 35 nats; 0 does without one.
        ptx: weight of the likelihood of the rows' own answers; 0 does without them.
        lam: how far rewards are believed rather than the critic.
        critic_rollouts: rollouts at first from which the critic alone learns.
    """
    done, state = counted(state)
    own_UKT = r.mask_UKT * r["own"][..., None]
    before = {n: state[n] for n in ("mean", "var", "count")} if done else None
    state |= (running := moments(before, r["reward"][r["own"] > 0].cpu()))
    score_UK = shaped(r["reward"], running, reward, clip_reward)
    # Turns were paid in raw rewards, which do not add up to a normalised one.
    whole = replace(r, tensors={n: t for n, t in r.tensors.items() if n != "turn_reward"})
    advantage_UKT = gae(token_rewards(whole, score_UK, beta), r["values"], own_UKT, lam=lam)
    tensors = {"returns": (advantage_UKT + r["values"]) * own_UKT}
    tensors["advantage"] = normalised(advantage_UKT, own_UKT, clip_advantage)
    seen = monitors(r, own_UKT, state)
    seen["explained"] = explained(r["values"], tensors["returns"], own_UKT)
    critic, policy = critic_loss(clip_value), policy_loss(clip_ratio, importance, entropy, ptx)
    if done < critic_rollouts:
        return Update(tensors, critic, metrics=seen, state=state, head_only=True)
    return Update(tensors, lambda m: policy(m) + vf * critic(m), metrics=seen, state=state)

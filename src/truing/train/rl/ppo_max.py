"""PPO-max: PPO with each trick of "Secrets of RLHF" a switch, and monitors that see collapse.

    R~ = clip((R - mu) / sigma, -d, d)    mu, sigma over all rewards so far, this batch included
    r_t = -beta (log pi_old - log pi_ref) + [t is the last] R~;  A, ret by GAE, as in `ppo`
    policy  max(-A ratio, -A clip(ratio, 1 - e, 1 + e));   value, clipped, as in `ppo`
    loss = policy + vf value + w |H - H_target| + ptx NLL(text)                   arXiv 2307.04964

The twelve tricks: token KL (`beta`), importance sampling (`importance`), entropy bonus (`entropy`),
reward scaling and normalisation with clipping (`reward_shape`, `clip_reward`), advantage
normalisation and clipping (`normalise_advantage`, `clip_advantage`), value clipping (`clip_value`),
critic (input `critic`: the reward model, the model before its training with a zero head, or an
earlier critic), policy (the model given: train it by sft first), GAE (`lam`), clipped surrogate
(`clip_ratio`), gradient clipping (`clip`).

The critic learns alone at first, at `critic_rate`, the policy held fixed, until its loss
mean (V - ret)^2 / 2 on answers that it has not learnt from is at most `critic_until` of the loss
that the best constant would have there. That share is at least 1 for a critic that says the same
everywhere, whatever it says and however long the answers are; the loss itself is small in long ones
for any critic, since lam^(T - t) fades. It never takes more than `critic_rollouts` rollouts, since
returns need not be foreseeable. `critic_loss` records the loss, `critic_share` the share,
`critic_alone` which rollouts these were.

PPO-ptx learns given text in each update of the policy, at temperature 1: other rows by `mix: {sft:
1}` and the input `mix_data`, or with `ptx` above 0 the prompts' own column `completion`. But for it
the defaults are the paper's PPO-max, which begins the critic as the reward model: give that as
`critic`. Without one a head on the policy's own trunk has to do. The paper's optimizer has
`adam_beta2` 0.95 and `adam_epsilon` 1e-6, its schedule is `inverse_sqrt`. R~ of a whole episode, or
of rewards that fall inside of an answer, is paid at its end.

Differences: a new head is zero, not random; advantages are normalised over the rollout, not the
minibatch, and H - H_target is taken token by token, the same on one side of the target, so that no
split of the batch can change a step; the critic's epsilon is the policy's. Groups are allowed.

Monitors: reward and its deviation and largest value, kl (the mean log-ratio to the reference per
token, which may be below 0), length, perplexity of the policy's own answers under itself and under
the reference. `alarm` is 1, and a warning is printed the first time, where kl exceeds 0.3 nats or
answers are half as long again as in the first rollout, since the reward cannot tell collapse.

Shapes: U groups, K answers, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

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
from truing.core.rl.advantages import all_equal, gae, kl_tokens, moments, sigma, whiten
from truing.train.rl.ppo import counted, critic_loss, explained, token_rewards

Shape = Literal["raw", "scaled", "normalised"]
ALARM_KL, ALARM_LENGTH = 0.3, 1.5
EQUAL = 1e-9  # deviation over the mean, below which rewards so far are equal: no scale


def shaped(reward: Tensor, running: State, how: Shape, clip: float) -> Tensor:
    """Rewards as they are, over sigma, or centred and over sigma; the last clipped to +-clip."""
    if how == "raw":
        return reward
    spread, mean = sigma(running).to(reward), running["mean"].to(reward)
    spread = torch.where(spread > EQUAL * (1 + mean.abs()), spread, 1.0)
    if how == "scaled":
        return reward / spread
    return ((reward - mean) / spread).clamp(-(clip or torch.inf), clip or torch.inf)


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
        kl = (kl_tokens(r["logp"], r["ref_logp"], "k1") * own_UKT).sum() / count
        seen["kl"] = kl
        seen["perplexity_ref"] = (-(r["ref_logp"] * own_UKT).sum() / count).exp()
        seen["alarm"] = torch.maximum(seen["alarm"], (kl > ALARM_KL).float())
    return seen


def shaped_advantage(
    advantage_UKT: Tensor, own_UKT: Tensor, normalise: bool, clip: float
) -> Tensor:
    """Advantages of the policy's own tokens: of unit deviation, none beyond +-clip, or as is."""
    if normalise:
        advantage_UKT = whiten(advantage_UKT, own_UKT, unbiased=False, eps=1e-6)
    if clip:
        advantage_UKT = advantage_UKT.clamp(-clip, clip)
    return advantage_UKT * own_UKT


def value_error(
    advantage_UKT: Tensor, reward_UKT: Tensor, own_UKT: Tensor, lam: float
) -> tuple[Tensor, Tensor]:
    """The critic's loss on these answers, and its share of the best constant critic's.

    The loss is mean (V - ret)^2 / 2 = mean A^2 / 2 over the policy's own tokens. A is linear in the
    values: that of the constant c is A_0 + c A_1, of least squares at c = - A_0 . A_1 / A_1 . A_1.
    The share is infinite where that constant leaves nothing to explain.
    """
    zero_UKT = torch.zeros_like(reward_UKT)
    nothing_UKT = gae(reward_UKT, zero_UKT, own_UKT, lam=lam) * own_UKT
    one_UKT = gae(zero_UKT, own_UKT, own_UKT, lam=lam) * own_UKT
    slope = (nothing_UKT * one_UKT).sum() / (one_UKT**2).sum().clamp(min=1e-12)
    whole = ((nothing_UKT - slope * one_UKT) ** 2).sum()
    left, count = (advantage_UKT**2 * own_UKT).sum(), own_UKT.sum().clamp(min=1)
    return 0.5 * left / count, torch.where(whole > 0, left / whole, torch.inf)


def policy_loss(
    clip_ratio: float, importance: bool, entropy: float, target: float, ptx: float
) -> Callable[[Measurements], Loss]:
    """The policy's loss: the surrogate, the entropy term, the likelihood of given answers."""
    reach = clip_ratio or float("inf")

    def loss(m: Measurements) -> Loss:
        policy_UKT = clipped(m, reach, reach) if importance else -advantages(m) * m.logp_UKT
        made = by_token(policy_UKT, m, m["own"])
        made = watched(made, clip_fraction=clip_fraction(m, reach, reach)[m["own"] > 0])
        if entropy:
            made = made + entropy * by_token((m["entropy"] - target).abs(), m, m["own"])
        return made + ptx * by_token(-m.logp_UKT, m, 1 - m["own"]) if ptx else made

    return loss


def running_rewards(
    r: Measurements, state: State | None, how: Shape, clip: float, beta: float
) -> tuple[Tensor, int, State]:
    """r_t of a rollout, how many rollouts came before, and the state with its rewards counted."""
    done, state = counted(state)
    before = {n: state[n] for n in ("mean", "var", "count")} if done else None
    state |= (running := moments(before, r["reward"][r["own"] > 0].cpu()))
    score_UK = shaped(r["reward"], running, how, clip)
    # Turns and steps were paid in raw rewards, which do not add up to a normalised one.
    whole = replace(r, tensors={n: t for n, t in r.tensors.items() if n != "token_reward"})
    return token_rewards(whole, score_UK, beta), done, state


def estimates(
    r: Measurements, own_UKT: Tensor, reward_UKT: Tensor, lam: float
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Advantages and returns of the policy's own tokens, and how well the critic foresaw them."""
    advantage_UKT = gae(reward_UKT, r["values"], own_UKT, lam=lam)
    return_UKT = (advantage_UKT + r["values"]) * own_UKT
    loss, share = value_error(advantage_UKT, reward_UKT, own_UKT, lam)
    seen = {"critic_loss": loss, "critic_share": share}
    seen["explained"] = explained(r["values"], return_UKT, own_UKT)
    return advantage_UKT, return_UKT, seen


def critic_alone(
    r: Measurements, state: State, done: int, share: Tensor, until: float, most: int
) -> bool:
    """Whether the critic learns alone from this rollout; never again once the policy has begun."""
    # Answers of equal rewards say nothing of a critic.
    ready = 0 < until >= float(share) and not all_equal(r["reward"], r["own"])
    return not (ready or done >= most or "begun" in state)


@online(
    paper="secrets-ppo-max",
    needs=("ref_logp", "values", "entropy"),
    given="completion",
    within={
        "clip_reward": (0, None),
        "clip_advantage": (0, None),
        "entropy_target": (0, None),
        "lam": (0, 1),
        "critic_until": (0, None),
    },
)
def ppo_max(
    r: Measurements,
    state: State | None = None,
    *,
    beta: float = 0.02,
    reward_shape: Shape = "normalised",
    clip_reward: float = 10.0,
    normalise_advantage: bool | None = None,
    clip_advantage: float = 0.0,
    importance: bool = True,
    clip_ratio: float = 0.2,
    clip_value: float = 0.2,
    vf: float = 1.0,
    entropy: float = 0.0,
    entropy_target: float = 35.0,
    ptx: float = 0.0,
    lam: float = 0.95,
    critic_until: float = 0.1,
    critic_rollouts: int = 10,
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
        reward_shape: rewards as they are, divided by their running deviation, or normalised by it.
        clip_reward: largest normalised reward; 0 for any.
        normalise_advantage: to mean 0 and population deviation 1; null where they are clipped.
        clip_advantage: largest advantage; 0 for any.
        importance: weigh by the ratio to the policy that drew the answers.
        clip_ratio: how far from 1 that ratio counts; 0 for any distance.
        entropy: weight of the entropy term; 0 does without one.
        entropy_target: in nats; 35, which no vocabulary reaches, rewards ever more entropy.
        ptx: weight of the likelihood of the rows' own answers; 0 does without them.
        lam: how far rewards are believed rather than the critic.
        critic_until: loss of the critic, as a share of the best constant's, at which the policy
            begins to learn; 0 takes all of `critic_rollouts`.
        critic_rollouts: most rollouts at first from which the critic alone learns.
    """
    own_UKT = r.mask_UKT * r["own"][..., None]
    reward_UKT, done, state = running_rewards(r, state, reward_shape, clip_reward, beta)
    advantage_UKT, return_UKT, seen = estimates(r, own_UKT, reward_UKT, lam)
    normalise = bool(clip_advantage) if normalise_advantage is None else normalise_advantage
    kept_UKT = shaped_advantage(advantage_UKT, own_UKT, normalise, clip_advantage)
    tensors = {"advantage": kept_UKT, "returns": return_UKT}
    alone = critic_alone(r, state, done, seen["critic_share"], critic_until, critic_rollouts)
    seen |= monitors(r, own_UKT, state) | {"critic_alone": torch.tensor(float(alone))}
    critic = critic_loss(clip_value)
    if alone:
        return Update(tensors, critic, metrics=seen, state=state, head_only=True)
    state["begun"] = torch.ones(())
    policy = policy_loss(clip_ratio, importance, entropy, entropy_target, ptx)
    return Update(tensors, lambda m: policy(m) + vf * critic(m), metrics=seen, state=state)

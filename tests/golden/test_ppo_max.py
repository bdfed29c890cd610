"""PPO-max by hand: running moments, shaped rewards, each trick as a switch, the monitors."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from online_numbers import (
    NEW,
    OLD,
    REF,
    REWARD,
    gradient,
    loss_of,
    mean,
    ones,
    rollout,
    std,
    total,
)

from truing.core.objective import Measurements, State
from truing.core.online import Update
from truing.core.rl.advantages import moments, sigma
from truing.train.rl.ppo import token_rewards
from truing.train.rl.ppo_max import ppo_max, shaped

FLAT = [r for g in REWARD for r in g]
OFF: dict[str, float] = {"vf": 0.0, "critic_rollouts": 0}


def test_running_moments_are_those_of_all_that_was_seen() -> None:
    source = torch.Generator().manual_seed(3)
    values = torch.randn(20, generator=source, dtype=torch.float64) * 3 + 5
    for cuts in ([20], [1, 19], [7, 7, 6]):
        state = None
        for part in values.split(cuts):
            state = moments(state, part)
        assert state is not None
        assert float(state["mean"]) == pytest.approx(float(values.mean()), rel=1e-12)
        assert float(sigma(state)) == pytest.approx(float(values.std()), rel=1e-10)


def test_rewards_by_hand() -> None:
    state = moments(None, torch.tensor(FLAT))
    reward = torch.tensor(REWARD)
    assert shaped(reward, state, "raw", 0.1).tolist() == REWARD
    scaled = shaped(reward, state, "scaled", 0.1).flatten().tolist()
    assert scaled == pytest.approx([x / std(FLAT) for x in FLAT])
    z = [(x - mean(FLAT)) / std(FLAT) for x in FLAT]
    clipped = shaped(reward, state, "normalised", 0.8).flatten().tolist()
    assert clipped == pytest.approx([min(max(x, -0.8), 0.8) for x in z], rel=1e-5)
    equal = moments(None, torch.ones(3))
    assert shaped(torch.ones(3), equal, "normalised", 0.0).tolist() == [0.0] * 3
    assert shaped(torch.ones(3), equal, "scaled", 0.0).tolist() == [1.0] * 3
    spread = moments(None, torch.tensor([1.0, 1.0, 1.001]))  # small is not equal
    assert float(shaped(torch.ones(1), spread, "scaled", 0.0)) > 1000


def test_token_rewards_sum_to_the_score_less_the_divergence() -> None:
    r = rollout()
    made = token_rewards(r, torch.tensor(REWARD), 0.02).sum(-1)
    for u in range(2):
        for k in range(2):
            wanted = REWARD[u][k] - 0.02 * (sum(OLD[u][k]) - sum(REF[u][k]))
            assert float(made[u, k]) == pytest.approx(wanted, rel=1e-5)


def test_the_first_update_is_minus_the_mean_advantage() -> None:
    r = rollout()
    update = ppo_max(r, **OFF)
    loss = loss_of(update, r, now=OLD)
    a = update.tensors["advantage"]
    assert total(loss) == pytest.approx(-float(a.sum()) / 10, rel=1e-5)
    assert torch.allclose(gradient(loss), -a / 10, atol=1e-6)


def test_advantages_are_normalised_and_clipped_by_a_switch_each() -> None:
    r, there = rollout(), ones() > 0

    def made(**more: float | None) -> list[float]:
        tensor = ppo_max(r, **OFF, **more).tensors["advantage"]
        assert tensor[~there].abs().sum() == 0
        return tensor[there].tolist()

    plain = made()
    mu = mean(plain)
    deviation = math.sqrt(mean([(a - mu) ** 2 for a in plain]) + 1e-6)
    whole = [(a - mu) / deviation for a in plain]
    both = [min(max(a, -0.5), 0.5) for a in whole]
    assert max(map(abs, plain)) > 0.5 and mu != pytest.approx(0, abs=0.1)
    assert made(normalise_advantage=True) == pytest.approx(whole, rel=1e-4)
    assert made(normalise_advantage=False, clip_advantage=0.5) == pytest.approx(
        [min(max(a, -0.5), 0.5) for a in plain]
    )
    # Where nothing is said, they are normalised before they are clipped.
    assert made(clip_advantage=0.5) == pytest.approx(both, rel=1e-4)
    assert made(normalise_advantage=True, clip_advantage=0.5) == pytest.approx(both, rel=1e-4)


def test_switches() -> None:
    r = rollout()
    # Without importance sampling: the plain policy gradient, whatever has moved.
    plain = ppo_max(r, importance=False, **OFF)
    got = gradient(loss_of(plain, r, now=NEW))
    assert torch.allclose(got, -plain.tensors["advantage"] / 10, atol=1e-6)
    # The entropy term: 35 nats less what there is, over ten tokens.
    entropy = torch.full((2, 2, 4), 2.0)
    more = ppo_max(r, entropy=0.1, **OFF)
    base = total(loss_of(ppo_max(r, **OFF), r))
    assert total(loss_of(more, r, entropy=entropy)) == pytest.approx(base + 0.1 * 33, rel=1e-5)
    near = ppo_max(r, entropy=0.1, entropy_target=1.5, **OFF)  # on the other side of its target
    assert total(loss_of(near, r, entropy=entropy)) == pytest.approx(base + 0.1 * 0.5, rel=1e-5)


def test_ptx_learns_from_the_given_answer_alone() -> None:
    """The second answer of each group is the row's own: no policy term reaches it."""
    r = rollout(own=[[1.0, 0.0], [1.0, 0.0]])
    update = ppo_max(r, ptx=0.5, **OFF)
    assert update.tensors["advantage"][:, 1].abs().sum() == 0
    got = gradient(loss_of(update, r, now=OLD))
    own = update.tensors["advantage"][:, 0]
    assert torch.allclose(got[:, 0], -own / 4, atol=1e-6)
    assert torch.allclose(got[:, 1], -0.5 * ones()[:, 1] / 6, atol=1e-6)
    # Only the policy's own rewards are normalised by.
    assert update.state is not None and float(update.state["count"]) == pytest.approx(2.0)


def test_monitors() -> None:
    r = rollout()
    first = ppo_max(r, **OFF)
    seen = {n: float(v) for n, v in first.metrics.items()}
    old = [x for row in OLD for y in row for x in y]
    ref = [x for row in REF for y in row for x in y]
    assert seen["reward_std"] == pytest.approx(std(FLAT)) and seen["reward_max"] == 3.0
    assert seen["perplexity"] == pytest.approx(math.exp(-mean(old)), rel=1e-5)
    assert seen["perplexity_ref"] == pytest.approx(math.exp(-mean(ref)), rel=1e-5)
    # The mean log-ratio, which falls below 0 where the reference likes what was drawn better.
    assert seen["kl"] == pytest.approx(mean([a - b for a, b in zip(old, ref, strict=True)]))
    assert seen["kl"] == pytest.approx(-0.15) and seen["alarm"] == 0.0
    far = ppo_max(r.having(ref_logp=r["logp"] - 0.31), **OFF).metrics
    assert float(far["kl"]) == pytest.approx(0.31, rel=1e-5) and far["alarm"] == 1.0
    near = r.having(ref_logp=r["logp"])
    calm = ppo_max(near, **OFF)
    assert float(calm.metrics["alarm"]) == 0.0 and calm.state is not None
    short = {**calm.state, "first_length": torch.tensor(1.0)}
    assert float(ppo_max(near, short, **OFF).metrics["alarm"]) == 1.0  # 2.5 tokens, from 1


def test_the_policy_begins_when_the_critic_is_ready() -> None:
    """By the loss on answers that it has not learnt from, at the latest after so many rollouts."""
    r, there = rollout(), ones() > 0
    update = ppo_max(r, vf=0.0, critic_rollouts=3)
    gap = (update.tensors["returns"] - r["values"])[there].tolist()
    loss = mean([g * g / 2 for g in gap])
    assert float(update.metrics["critic_loss"]) == pytest.approx(loss, rel=1e-5)
    share = float(update.metrics["critic_share"])
    assert share > 0.1 and update.head_only and update.metrics["critic_alone"] == 1.0

    def until(limit: float, state: State | None = None) -> Update:
        return ppo_max(r, state, vf=0.0, critic_rollouts=3, critic_until=limit)

    assert until(share * 0.999).head_only
    ready = until(share * 1.001)
    assert not ready.head_only and ready.metrics["critic_alone"] == 0.0
    assert until(0.0).head_only  # no loss is small enough
    # Once it has begun the policy goes on, whatever becomes of the critic.
    assert not until(0.0, ready.state).head_only
    # The most rollouts, counted from the first.
    state: State | None = None
    seen: list[bool] = []
    for _ in range(5):
        made = until(1e-9, state)
        seen.append(made.head_only)
        state = made.state
    assert seen == [True, True, True, False, False]
    # Rewards that are all equal say nothing of a critic, though its loss is 0.
    flat = r.having(values=torch.zeros_like(r["values"]), ref_logp=r["logp"])
    flat = replace(flat, columns={**flat.columns, "reward": torch.ones(2, 2)})
    assert ppo_max(flat, vf=0.0, critic_rollouts=3, critic_until=1.0).head_only


@pytest.mark.parametrize("length", [1, 20, 240])
def test_a_critic_that_knows_nothing_is_not_ready_however_long_the_answers(length: int) -> None:
    """A constant V = c: gaps lam^(T - t) (R - c), which are small but near the end."""
    source = torch.Generator().manual_seed(2)
    reward = torch.randn(4, 2, generator=source)
    there = torch.ones(4, 2, length)
    logp = -torch.rand(4, 2, length, generator=source)

    def made(value: torch.Tensor) -> Update:
        tensors = {"logp": logp, "ref_logp": logp, "values": value}
        columns = {"reward": reward, "own": torch.ones(4, 2)}
        r = Measurements(there, tensors, columns)
        return ppo_max(r, vf=0.0, critic_rollouts=3, reward_shape="raw")

    rewards = reward.flatten().tolist()
    fade = [0.95 ** (length - 1 - t) for t in range(length)]
    for c in (0.0, 5.0):
        update = made(torch.full_like(there, c))
        loss = mean([(f * (x - c)) ** 2 / 2 for x in rewards for f in fade])
        assert float(update.metrics["critic_loss"]) == pytest.approx(loss, rel=1e-4)
        wanted = mean([(x - c) ** 2 for x in rewards]) / mean(
            [(x - mean(rewards)) ** 2 for x in rewards]
        )
        assert float(update.metrics["critic_share"]) == pytest.approx(wanted, rel=1e-4)
        assert wanted >= 1 and update.head_only
    # One that foresees each answer's reward is, and so is one that is off by a fifth.
    foreseen = reward[..., None].expand_as(there).contiguous()
    assert not made(foreseen).head_only
    off = made(0.8 * foreseen)
    assert float(off.metrics["critic_share"]) < 0.1 and not off.head_only
    assert made(0.5 * foreseen).head_only

"""PPO by hand: token rewards, GAE, whitening, the clipped losses of policy and critic."""

from __future__ import annotations

import math

import pytest
import torch
from online_numbers import (
    ANSWERS,
    OLD,
    REF,
    REWARD,
    VALUE,
    gradient,
    loss_of,
    mean,
    ones,
    ratio,
    rollout,
    std,
    surrogate,
    tensor,
    tokens,
    total,
)

from truing.core.rl.advantages import at_end, gae, to_go, whiten
from truing.train.rl.ppo import explained, ppo

BETA, GAMMA, LAM = 0.2, 0.9, 0.7


def steps(u: int, k: int, beta: float = BETA) -> list[float]:
    made = [-beta * (OLD[u][k][t] - REF[u][k][t]) for t in tokens(u, k)]
    made[-1] += REWARD[u][k]
    return made


def by_hand(u: int, k: int, gamma: float = GAMMA, lam: float = LAM) -> list[float]:
    reward, value = steps(u, k), VALUE[u][k]
    n = len(reward)
    delta = [reward[t] + gamma * (value[t + 1] if t + 1 < n else 0.0) - value[t] for t in range(n)]
    return [sum((gamma * lam) ** (s - t) * delta[s] for s in range(t, n)) for t in range(n)]


def test_ppo_by_hand() -> None:
    r = rollout()
    update = ppo(r, beta=BETA, gamma=GAMMA, lam=LAM, vf=0.3)
    a = [by_hand(u, k) for u, k in ANSWERS]
    ret = [[x + v for x, v in zip(row, VALUE[u][k])] for row, (u, k) in zip(a, ANSWERS)]
    flat = [x for row in a for x in row]
    white = [[(x - mean(flat)) / math.sqrt(std(flat) ** 2 + 1e-8) for x in row] for row in a]
    for (u, k), row, back in zip(ANSWERS, white, ret, strict=True):
        n = len(row)
        assert update.tensors["advantage"][u, k, :n].tolist() == pytest.approx(row, abs=1e-5)
        assert update.tensors["returns"][u, k, :n].tolist() == pytest.approx(back, abs=1e-5)
    # The critic says something new: a third more than before, and 0.5 at the start of each.
    now = [([1.3 * v + 0.5 for v in row[0]], [1.3 * v + 0.5 for v in row[1]]) for row in VALUE]
    loss = loss_of(update, r, values=tensor(now))
    policy, critic = [], []
    for i, (u, k) in enumerate(ANSWERS):
        for t in tokens(u, k):
            policy.append(surrogate(ratio(u, k, t), white[i][t], 0.2, 0.2))
            v, old = now[u][k][t], VALUE[u][k][t]
            near = min(max(v, old - 0.2), old + 0.2)
            critic.append(0.5 * max((v - ret[i][t]) ** 2, (near - ret[i][t]) ** 2))
    assert total(loss) == pytest.approx(mean(policy) + 0.3 * mean(critic), rel=1e-5)


def test_limits_of_gae() -> None:
    reward, value, mask = (x * ones() for x in (torch.randn(2, 2, 4), tensor(VALUE), ones()))
    whole = gae(reward, value, mask, lam=1.0)
    assert torch.allclose(whole, (to_go(reward, mask) - value) * mask, atol=1e-6)
    single = gae(reward, value, mask, lam=0.0)
    after = torch.nn.functional.pad(value[..., 1:], (0, 1))
    assert torch.allclose(single, (reward + after - value) * mask, atol=1e-6)
    assert at_end(torch.tensor(REWARD), mask).sum(-1).tolist() == REWARD
    assert at_end(torch.tensor(REWARD), mask)[1, 0, 0] == 0.5


def test_at_ratio_one_the_gradient_is_reinforce() -> None:
    r = rollout()
    update = ppo(r, beta=0.0, vf=0.0)
    loss = loss_of(update, r, now=OLD)
    assert total(loss) == pytest.approx(0.0, abs=1e-6)  # whitened: their mean is 0
    assert torch.allclose(gradient(loss), -update.tensors["advantage"] / 10, atol=1e-6)


def test_wide_value_clipping_is_half_the_squared_error() -> None:
    r = rollout()
    update = ppo(r, vf=1.0, clip_value=1e9)
    plain = ppo(r, vf=1.0, clip_value=0.0)
    moved = tensor(VALUE) + 3.0
    a, b = (total(loss_of(u, r, values=moved)) for u in (update, plain))
    assert a == pytest.approx(b, rel=1e-6)


def test_the_head_learns_alone_at_first() -> None:
    r, state = rollout(), None
    alone: list[bool] = []
    for _ in range(3):
        update = ppo(r, state, critic_rollouts=2)
        alone.append(update.head_only)
        state = update.state
    assert alone == [True, True, False]


def test_whitening() -> None:
    x = torch.tensor([1.0, 2.0, 4.0, 50.0])
    mask = torch.tensor([1.0, 1.0, 1.0, 0.0])
    m, v = 7 / 3, ((4 / 3) ** 2 + (1 / 3) ** 2 + (5 / 3) ** 2)
    for unbiased, n in ((True, 2), (False, 3)):
        wanted = [(y - m) / math.sqrt(v / n + 1e-6) for y in (1.0, 2.0, 4.0)]
        got = whiten(x, mask, unbiased=unbiased, eps=1e-6).tolist()
        assert got == pytest.approx([*wanted, 0.0], rel=1e-5)


def test_explained_variance() -> None:
    back = torch.tensor([[[1.0, 2.0, 3.0]]])
    mask = torch.ones(1, 1, 3)
    assert float(explained(back, back, mask)) == pytest.approx(1.0)
    assert float(explained(torch.zeros(1, 1, 3), back, mask)) == pytest.approx(0.0)


@pytest.mark.parametrize("back", [0.0, 0.1, -3.0])
def test_of_returns_that_are_all_equal_nothing_is_explained(back: float) -> None:
    mask = torch.ones(1, 1, 7)
    same, other = torch.full((1, 1, 7), back), torch.arange(7.0).view(1, 1, 7)
    for critic in (torch.zeros(1, 1, 7), same, other):
        assert float(explained(critic, same, mask)) == 0.0
    # Equal but for the rounding of advantages and values that add up to them.
    assert float(explained(other, (same - other) + other, mask)) == 0.0

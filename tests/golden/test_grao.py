"""GRAO by hand: both statistics, degenerate groups, and limits."""

from __future__ import annotations

import math

import pytest
import torch
from online_numbers import NEW, OLD, gradient, loss_of, mean, rollout, total

from truing.core.rl.advantages import group_advantage
from truing.train.rl.grao import advantage, grao


def by_hand(rewards: list[float], with_given: bool) -> list[float]:
    of = rewards if with_given else rewards[:-1]
    m = mean(of)
    s = math.sqrt(mean([(x - m) ** 2 for x in of]))
    return [(x - m) / (s + 1e-4) for x in rewards]


@pytest.mark.parametrize("with_given", [True, False])
def test_grao_by_hand(with_given: bool) -> None:
    """One own answer and the given one: two of each group's numbers."""
    r = rollout(own=[[1.0, 0.0], [1.0, 0.0]])
    wanted = 0.0
    for u, rewards in enumerate([[1.0, 3.0], [0.5, -1.0]]):
        a, y = by_hand(rewards, with_given)
        if not with_given:  # a group of one is flat: bounded to [-1, sqrt(1)]
            a, y = 0.0, min(max(y, -1.0), 1.0)
        explore, imitate = a * mean(NEW[u][0]), mean(NEW[u][1])
        wanted -= explore + 0.5 * y * imitate + 0.6 * (explore - a * imitate)
    update = grao(r, given_in_statistics=with_given)
    assert total(loss_of(update, r)) == pytest.approx(wanted / 2, rel=1e-4)


def test_degenerate_groups() -> None:
    root = math.sqrt(8)
    fail = torch.tensor([[0.0] * 8 + [1.0]])
    within = advantage(fail, True)[0].tolist()
    assert within == pytest.approx([-1 / root] * 8 + [root], rel=1e-3)
    printed = advantage(fail, False)[0].tolist()
    assert printed == pytest.approx([0.0] * 8 + [root])
    beaten = advantage(torch.tensor([[1.0] * 8 + [0.0]]), False)[0].tolist()
    assert beaten == pytest.approx([0.0] * 8 + [-1.0])
    for with_given in (True, False):
        assert not advantage(torch.full((1, 9), 0.3), with_given).any()


def test_without_both_terms_it_is_reinforce() -> None:
    """GRPO at ratio 1 with the population's deviation: sqrt((G-1)/G) times GRPO's advantages."""
    r = rollout(own=[[1.0, 0.0], [1.0, 0.0]])
    loss = loss_of(grao(r, imitation=0.0, alignment=0.0), r, now=OLD)
    got = gradient(loss)
    for u, rewards in enumerate([[1.0, 3.0], [0.5, -1.0]]):
        a = by_hand(rewards, True)[0]
        n = len(OLD[u][0])
        assert got[u, 0, :n].tolist() == pytest.approx([-a / n / 2] * n, rel=1e-4)
    assert got[:, 1].abs().sum() == 0
    reward = torch.tensor([[1.0, 3.0, 2.0, 7.0]])
    ours = advantage(torch.cat([reward, reward[:, :1]], 1), False)[:, :-1]
    theirs = group_advantage(reward, torch.ones(1, 4))
    assert torch.allclose(theirs, ours * math.sqrt(3 / 4), atol=1e-3)


def test_shift_and_scale_of_rewards() -> None:
    source = torch.Generator().manual_seed(0)
    reward = torch.randn(3, 5, generator=source)
    for with_given in (True, False):
        a = advantage(reward, with_given)
        assert torch.allclose(a, advantage(reward + 7.0, with_given), atol=1e-4)
        assert torch.allclose(a, advantage(reward * 3.0, with_given), atol=1e-3)


def test_the_ratio_changes_no_first_gradient() -> None:
    r = rollout(own=[[1.0, 0.0], [1.0, 0.0]])
    one = gradient(loss_of(grao(r), r, now=OLD))
    two = gradient(loss_of(grao(r, clip_ratio=0.2), r, now=OLD))
    assert torch.allclose(one, two, atol=1e-6)


def test_clipping_the_given_answers_advantage() -> None:
    r = rollout(own=[[1.0, 0.0], [1.0, 0.0]])
    made = grao(r, clip_given_at_zero=True).tensors["advantage"]
    assert made[1, 1] == 0.0 and made[0, 1] > 0.9

"""GRPO and its one-term variants by hand, and what equals what."""

from __future__ import annotations

import math

import pytest
import torch
from online_numbers import (
    ANSWERS,
    OLD,
    REF,
    REWARD,
    A,
    gradient,
    k3,
    loss_of,
    mean,
    ones,
    ratio,
    rollout,
    std,
    surrogate,
    tokens,
    total,
)

from truing.core.online import clipped
from truing.core.rl.advantages import group_advantage, leave_one_out, overlong
from truing.errors import InputError
from truing.train.rl.grpo import dapo, dr_grpo, gdpo, grpo


def test_grpo_by_hand() -> None:
    r = rollout()
    update = grpo(r, beta=0.3)
    assert update.tensors["advantage"].flatten().tolist() == pytest.approx(A[0] + A[1], rel=1e-5)
    per = [
        mean(
            [surrogate(ratio(u, k, t), A[u][k], 0.2, 0.2) + 0.3 * k3(u, k, t) for t in tokens(u, k)]
        )
        for u, k in ANSWERS
    ]
    assert total(loss_of(update, r)) == pytest.approx(mean(per), rel=1e-5)
    assert update.active_U is None  # the KL term gives every group a gradient


def test_kl_in_the_reward_by_hand() -> None:
    for kind in ("k1", "k2", "k3", "k3_ratio"):
        update = grpo(rollout(), beta=0.3, kl=kind, kl_in="reward")
        for u in range(2):
            shaped: list[float] = []
            for k in range(2):
                gaps = [OLD[u][k][t] - REF[u][k][t] for t in tokens(u, k)]
                of = {
                    "k1": sum(gaps),
                    "k2": sum(g * g / 2 for g in gaps),
                    "k3": sum(math.exp(-g) + g - 1 for g in gaps),
                }
                shaped.append(REWARD[u][k] - 0.3 * of[kind.removesuffix("_ratio")])
            wanted = [(x - mean(shaped)) / (std(shaped) + 1e-4) for x in shaped]
            assert update.tensors["advantage"][u].tolist() == pytest.approx(wanted, rel=1e-4)


def test_dr_grpo_by_hand() -> None:
    r = rollout()
    per = [
        sum(
            surrogate(ratio(u, k, t), REWARD[u][k] - mean(REWARD[u]), 0.2, 0.2)
            for t in tokens(u, k)
        )
        for u, k in ANSWERS
    ]
    assert total(loss_of(dr_grpo(r, max_tokens=7), r)) == pytest.approx(mean(per) / 7, rel=1e-5)


def test_dapo_by_hand() -> None:
    r = rollout()
    # Lengths 3, 2, 1, 4 of at most 4 with a buffer of 2: nothing, nothing, nothing, -1; 3 -> -1/2.
    punished = [[1.0 - 0.5, 3.0], [0.5, -1.0 - 1.0]]
    a = [[(x - mean(g)) / (std(g) + 1e-4) for x in g] for g in punished]
    per = [
        [surrogate(ratio(u, k, t), a[u][k], 0.2, 0.28) for t in tokens(u, k)] for u, k in ANSWERS
    ]
    update = dapo(r, max_tokens=4, buffer=2)
    assert total(loss_of(update, r)) == pytest.approx(
        mean([x for row in per for x in row]), rel=1e-5
    )
    # The only answer without a stop token is the first of the second group.
    kept = dapo(r, max_tokens=4, buffer=2, drop_unfinished=True)
    assert total(loss_of(kept, r)) == pytest.approx(mean(per[0] + per[1] + per[3]), rel=1e-5)


def test_gdpo_by_hand() -> None:
    one, two = [[1.0, 0.0], [0.0, 2.0]], [[0.0, 3.0], [0.0, 1.0]]
    r = rollout(**{"reward/one": one, "reward/two": two})
    sums: list[float] = []
    for g, h in zip(one, two, strict=True):
        x, y = ([(v - mean(z)) / (std(z) + 1e-4) for v in z] for z in (g, h))
        sums += [0.5 * a + b for a, b in zip(x, y, strict=True)]
    wanted = [(s - mean(sums)) / (std(sums) + 1e-4) for s in sums]
    update = gdpo(r, weights={"one": 0.5})
    assert update.tensors["advantage"].flatten().tolist() == pytest.approx(wanted, rel=1e-4)


def test_gdpo_counts_a_missing_end() -> None:
    """As one more reward, 1 with a stop token and 0 without, of the weight that was given."""
    r = rollout(**{"reward/one": REWARD})
    ended = [[0.0, 0.0], [-1 / (math.sqrt(2) + 2e-4), 1 / (math.sqrt(2) + 2e-4)]]
    sums = [a + 3.0 * e for x, y in zip(A, ended, strict=True) for a, e in zip(x, y, strict=True)]
    wanted = [(s - mean(sums)) / (std(sums) + 1e-4) for s in sums]
    update = gdpo(r, missing_end=3.0)
    assert update.tensors["advantage"].flatten().tolist() == pytest.approx(wanted, rel=1e-4)


def test_scales_by_hand() -> None:
    reward, there = torch.tensor(REWARD), torch.ones(2, 2)
    flat = [r for g in REWARD for r in g]
    centre = [r - mean(g) for g in REWARD for r in g]
    assert group_advantage(reward, there, "none").flatten().tolist() == pytest.approx(centre)
    batch = [c / (std(flat) + 1e-4) for c in centre]
    assert group_advantage(reward, there, "batch").flatten().tolist() == pytest.approx(batch)
    assert overlong(torch.tensor([[2.0, 5.0, 9.0, 12.0]]), 10, 4)[0].tolist() == pytest.approx(
        [0.0, 0.0, -0.75, -1.0]
    )
    with pytest.raises(InputError, match="buffer"):
        overlong(torch.ones(1, 1), 10, 0)


def test_properties_of_advantages() -> None:
    source = torch.Generator().manual_seed(1)
    reward, there = torch.randn(5, 4, generator=source), torch.ones(5, 4)
    assert group_advantage(reward, there).sum(1).abs().max() < 1e-5
    assert torch.equal(
        group_advantage(torch.full((2, 3), 0.1), torch.ones(2, 3)), torch.zeros(2, 3)
    )
    mean_U1 = reward.mean(1, keepdim=True)
    assert torch.allclose(leave_one_out(reward, there), 4 / 3 * (reward - mean_U1), atol=1e-6)
    # Groups of different sizes: what does not exist counts for nothing.
    there[0, 2:] = 0.0
    alone = group_advantage(reward[:1, :2], torch.ones(1, 2))
    assert torch.allclose(group_advantage(reward, there)[0, :2], alone[0])


def test_at_ratio_one_the_gradient_is_reinforce() -> None:
    r = rollout()
    update = grpo(r)
    loss = loss_of(update, r, now=OLD)
    assert total(loss) == pytest.approx(0.0, abs=1e-6)  # minus the mean of the advantages
    got = gradient(loss)
    for u, k in ANSWERS:
        n = len(OLD[u][k])
        assert got[u, k, :n].tolist() == pytest.approx([-A[u][k] / n / 4] * n, rel=1e-5)
        assert got[u, k, n:].abs().sum() == 0


def test_equal_rewards_have_no_gradient_and_are_left_out() -> None:
    r = rollout(reward=[[0.1, 0.1], [1.0, 2.0]])
    update = grpo(r)
    assert update.active_U is not None and update.active_U.tolist() == [False, True]
    assert gradient(loss_of(update, r))[0].abs().sum() == 0


def test_length_counts_in_dr_grpo_only() -> None:
    """Twice the same tokens: twice Dr. GRPO's loss, the same GRPO's."""
    r = rollout()
    for method, factor in ((grpo, 1.0), (dr_grpo, 2.0)):
        update = method(r)
        m = loss_of(update, r).given  # type: ignore[attr-defined]
        twice = type(m)(
            torch.cat([m.mask_UKT, m.mask_UKT], -1),
            {n: torch.cat([t, t], -1) for n, t in m.tensors.items()},
            m.columns,
        )
        one, two = (float(update.loss(x).total().detach()) for x in (m, twice))
        assert two == pytest.approx(factor * one, rel=1e-5)


def test_two_sided_clipping_bounds_negative_advantages() -> None:
    r = rollout()
    m = loss_of(grpo(r), r).given  # type: ignore[attr-defined]
    far = m.having(logp=m["old_logp"] + 3.0 * ones())
    free, held = (clipped(far, bound=b) * ones() for b in (0.0, 4.0))
    assert free.max() == pytest.approx(-min(A[0][0], A[1][1]) * math.exp(3.0), rel=1e-4)
    assert held.max() == pytest.approx(-min(A[0][0], A[1][1]) * 4.0, rel=1e-4)

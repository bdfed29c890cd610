"""GRPO on the tokens of high entropy alone: the quantile and the losses by hand."""

from __future__ import annotations

import random
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from online_numbers import (
    ANSWERS,
    ENTROPY,
    OLD,
    REWARD,
    A,
    gradient,
    k3,
    loss_of,
    mean,
    ratio,
    rollout,
    std,
    surrogate,
    tokens,
    total,
)

from truing.core.online import Update
from truing.core.rl.advantages import top_entropy
from truing.train.rl.grpo import dapo, dr_grpo, gdpo, grpo

EVERY = [ENTROPY[u][k][t] for u, k in ANSWERS for t in tokens(u, k)]  # of ten tokens


def quantile(values: list[float], share: str) -> Fraction:
    """The (1 - share) quantile, interpolated linearly, in exact numbers."""
    found = sorted(map(Fraction, values))
    place = (1 - Fraction(share)) * (len(found) - 1)
    low = int(place)
    high = min(low + 1, len(found) - 1)
    return found[low] + (place - low) * (found[high] - found[low])


def high(u: int, k: int, t: int, share: str) -> bool:
    return Fraction(ENTROPY[u][k][t]) >= quantile(EVERY, share)


def test_the_quantile_of_ten_tokens() -> None:
    """0.1 0.3 0.3 0.7 0.9 1.1 1.2 1.5 2.0 2.0: at 7.2 is 1.6, at 4.5 is 1.0, at 1.8 is 0.3."""
    assert [float(quantile(EVERY, s)) for s in ("0.2", "0.5", "0.8", "1")] == pytest.approx(
        [1.6, 1.0, 0.3, 0.1]
    )
    r = rollout()
    for share, kept, least in ((0.2, 2, 2.0), (0.5, 5, 1.1), (0.8, 9, 0.3), (1.0, 10, 0.1)):
        made, found = top_entropy(r["old_entropy"], r.mask_UKT, share)
        assert int(made.sum()) == kept and float(found) == pytest.approx(least)
        for u, k in ANSWERS:
            wanted = [float(high(u, k, t, str(share))) for t in tokens(u, k)]
            assert made[u, k].tolist() == wanted + [0.0] * (4 - len(wanted))


@pytest.mark.parametrize("share", ["0.2", "0.3", "0.29", "0.5", "0.7", "0.99", "1"])
def test_how_many_tokens_stay(share: str) -> None:
    """Those at or above the quantile: floor(share (n - 1)) + 1; ceil(0.2 n) for the paper's."""
    source = random.Random(share)
    for n in [*range(1, 40), 101, 701]:
        values = source.sample(range(4 * n), n)  # all differ
        made, _ = top_entropy(
            torch.tensor(values).float()[None, None], torch.ones(1, 1, n), float(share)
        )
        least = quantile([float(x) for x in values], share)
        by_hand = [v >= least for v in values]
        assert made[0, 0].bool().tolist() == by_hand
        assert sum(by_hand) == int(Fraction(share) * (n - 1)) + 1
        if share == "0.2":
            assert sum(by_hand) == -(-n // 5)


def test_rounding_does_not_part_what_is_equal() -> None:
    """The first tokens of a group have one entropy, whose last bits depend on the computation."""
    noise = torch.tensor([0.0, 3e-7, -4e-7, 1e-7, -2e-7, 2e-7])
    made, _ = top_entropy((noise + 1.5)[None, None], torch.ones(1, 1, 6), 0.5)
    assert made.sum() == 6
    apart, _ = top_entropy((1e3 * noise + 1.5)[None, None], torch.ones(1, 1, 6), 0.5)
    assert apart.sum() == 3


def test_grpo_by_hand() -> None:
    """The others keep their KL and their place in the denominators."""
    r, beta = rollout(), 0.3
    for share in ("0.2", "0.5", "0.8"):
        per: list[float] = []
        for u, k in ANSWERS:
            terms = [
                surrogate(ratio(u, k, t), A[u][k], 0.2, 0.2) * high(u, k, t, share)
                + beta * k3(u, k, t)
                for t in tokens(u, k)
            ]
            per.append(mean(terms))
        update = grpo(r, beta=beta, entropy_share=float(share))
        assert total(loss_of(update, r)) == pytest.approx(mean(per), rel=1e-5)
    seen = grpo(r, entropy_share=0.5).metrics
    assert float(seen["high_entropy"].mean()) == 0.5
    assert float(seen["high_entropy_from"]) == pytest.approx(1.1)


def test_the_others_have_no_gradient() -> None:
    r = rollout()
    got = gradient(loss_of(grpo(r, entropy_share=0.5), r, now=OLD))
    for u, k in ANSWERS:
        n = len(OLD[u][k])
        wanted = [-A[u][k] / n / 4 * high(u, k, t, "0.5") for t in range(n)]
        assert got[u, k, :n].tolist() == pytest.approx(wanted, rel=1e-5)


def test_a_group_without_such_tokens_is_left_out() -> None:
    """Of ten tokens the only one of 2.5 is in the first group: the second teaches nothing."""
    r = rollout()
    r.tensors["old_entropy"][0, 1, 0] = 2.5  # type: ignore[index]
    update = grpo(r, entropy_share=0.05)
    assert update.active_U is not None and update.active_U.tolist() == [True, False]
    assert grpo(r, entropy_share=0.05, beta=0.1).active_U is None  # its KL stays


def test_averages_of_the_others_by_hand() -> None:
    r = rollout(**{"reward/one": REWARD})
    parts = {
        (u, k): [
            surrogate(ratio(u, k, t), A[u][k], 0.2, 0.2) * high(u, k, t, "0.5")
            for t in tokens(u, k)
        ]
        for u, k in ANSWERS
    }
    every = [x for row in parts.values() for x in row]
    wide = dapo(r, clip_high=0.2, punish=0.0, entropy_share=0.5)
    assert total(loss_of(wide, r)) == pytest.approx(sum(every) / 10, rel=1e-5)
    raw = {x: (std(REWARD[x[0]]) + 1e-4) * sum(row) for x, row in parts.items()}
    long = dr_grpo(r, max_tokens=7, entropy_share=0.5)
    assert total(loss_of(long, r)) == pytest.approx(sum(raw.values()) / 4 / 7, rel=1e-5)
    flat = [x for g in A for x in g]
    scale = 1 / (std(flat) + 1e-4)  # A is centred already; its deviation divides once more
    several = gdpo(r, entropy_share=0.5)
    wanted = scale * mean([mean(row) for row in parts.values()])
    assert total(loss_of(several, r)) == pytest.approx(wanted, rel=1e-4)


def test_answers_out_of_dapos_loss_are_not_compared() -> None:
    """Without the one token of the unfinished answer nine are left: at 4.0 of 0..8 is 1.1."""
    r = rollout()
    left = sorted(x for x in EVERY if x != 0.9)
    assert left[4] == 1.1
    update = dapo(r, punish=0.0, drop_unfinished=True, entropy_share=0.5)
    kept = update.tensors["advantage"] != 0
    wanted = [
        [[t < len(row) and row[t] >= 1.1 for t in range(4)] for row in group] for group in ENTROPY
    ]
    assert kept.tolist() == wanted
    none = rollout(finished=[[0.0, 0.0], [0.0, 0.0]])
    made = dapo(none, drop_unfinished=True, entropy_share=0.5)
    assert made.tensors["advantage"].isfinite().all()
    assert made.metrics.keys() == {"dropped"} and made.metrics["dropped"].tolist() == [1.0] * 4


@pytest.mark.parametrize("method", [grpo, dr_grpo, dapo, gdpo])
def test_all_tokens_is_the_method_itself(method: Callable[..., Update]) -> None:
    """Without a measurement of entropies, which is not taken then."""
    r = rollout(**{"reward/one": REWARD})
    del r.tensors["old_entropy"]  # type: ignore[attr-defined]
    a, b = method(r), method(r, entropy_share=1.0)
    assert a.metrics == b.metrics == {} and a.tensors.keys() == b.tensors.keys()
    assert all(torch.equal(a.tensors[n], b.tensors[n]) for n in a.tensors)
    assert torch.equal(gradient(loss_of(a, r)), gradient(loss_of(b, r)))

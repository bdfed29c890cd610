"""GSPO and GMPO by hand; with answers of one token they are GRPO."""

from __future__ import annotations

import math

import pytest
import torch
from online_numbers import (
    ANSWERS,
    NEW,
    OLD,
    REWARD,
    A,
    gradient,
    k3,
    loss_of,
    mean,
    rollout,
    std,
    surrogate,
    tokens,
    total,
)

from truing.core.objective import Measurements
from truing.core.online import Aggregation
from truing.train.rl.grpo import grpo
from truing.train.rl.gspo import gmpo, gspo


def test_gspo_by_hand() -> None:
    r = rollout()
    per: list[float] = []
    for u, k in ANSWERS:
        a = (REWARD[u][k] - mean(REWARD[u])) / (std(REWARD[u]) + 1e-4)
        s = math.exp(mean([n - o for n, o in zip(NEW[u][k], OLD[u][k], strict=True)]))
        per.append(surrogate(s, a, 0.1, 0.15))
    loss = loss_of(gspo(r, clip_low=0.1, clip_high=0.15), r)
    assert total(loss) == pytest.approx(mean(per), rel=1e-5)


def test_gspo_by_sums_weighs_answers_by_length() -> None:
    r = rollout()
    per: list[float] = []
    for u, k in ANSWERS:
        gaps = [n - o for n, o in zip(NEW[u][k], OLD[u][k], strict=True)]
        per.append(len(gaps) * surrogate(math.exp(mean(gaps)), A[u][k], 0.1, 0.15))
    counts: dict[Aggregation, int] = {"luspo": 4, "bnpo": 10}
    for kind, count in counts.items():
        loss = loss_of(gspo(r, clip_low=0.1, clip_high=0.15, aggregate=kind), r)
        assert total(loss) == pytest.approx(sum(per) / count, rel=1e-5)


def one_token() -> tuple[Measurements, Measurements]:
    """A rollout of one-token answers, and what the model says of them now."""
    r = rollout()
    short = Measurements(
        torch.ones(2, 2, 1), {n: t[..., :1] for n, t in r.tensors.items()}, r.columns
    )
    moved = {
        **short.tensors,
        "old_logp": short["logp"],
        "logp": short["logp"] + torch.tensor([[[0.3], [-0.3]], [[0.1], [-0.1]]]),
    }
    return short, Measurements(short.mask_UKT, moved, {**r.columns, **grpo(short).tensors})


def test_answers_of_one_token_make_it_grpo() -> None:
    short, now = one_token()
    a, b = gspo(short, clip_low=0.2, clip_high=0.2), grpo(short)
    assert torch.equal(a.loss(now).per_unit, b.loss(now).per_unit)


def test_gmpo_by_hand() -> None:
    r, clip, beta = rollout(), 0.22, 0.3
    per: list[float] = []
    for u, k in ANSWERS:
        gaps = [n - o for n, o in zip(NEW[u][k], OLD[u][k], strict=True)]
        held = [max(g, -clip) if A[u][k] < 0 else min(g, clip) for g in gaps]
        pull = beta * mean([k3(u, k, t) for t in tokens(u, k)])
        per.append(-math.exp(mean(held)) * A[u][k] + pull)
    loss = loss_of(gmpo(r, beta=beta, clip_log=clip), r)
    assert total(loss) == pytest.approx(mean(per), rel=1e-5)
    # Advantages -, +, +, -. Gaps .2 -.25 0; -.25 .25; .5; -.25 .25 -.125 .5: where the sign of the
    # advantage is the gap's, what is beyond .22 is held.
    shares = [1 / 3, 1 / 2, 1.0, 1 / 4]
    assert loss.metrics["clip_fraction"].flatten().tolist() == pytest.approx(shares)


def test_gmpo_holds_no_gradient_of_what_it_clips() -> None:
    r, clip = rollout(), 0.22
    got = gradient(loss_of(gmpo(r, clip_log=clip), r))
    for u, k in ANSWERS:
        gaps = [n - o for n, o in zip(NEW[u][k], OLD[u][k], strict=True)]
        held = [max(g, -clip) if A[u][k] < 0 else min(g, clip) for g in gaps]
        slope = -A[u][k] * math.exp(mean(held)) / len(gaps) / 4
        wanted = [slope if h == g else 0.0 for g, h in zip(gaps, held, strict=True)]
        assert got[u, k, : len(gaps)].tolist() == pytest.approx(wanted, rel=1e-4, abs=1e-7)


def test_gmpo_at_ratio_one_is_reinforce() -> None:
    r = rollout()
    got = gradient(loss_of(gmpo(r), r, now=OLD))
    for u, k in ANSWERS:
        n = len(OLD[u][k])
        assert got[u, k, :n].tolist() == pytest.approx([-A[u][k] / n / 4] * n, rel=1e-5)


def test_one_token_makes_gmpo_grpo_clipped_in_logarithms() -> None:
    short, now = one_token()
    e = 0.2
    a = gmpo(short, clip_log=e)
    b = grpo(short, clip_low=1 - math.exp(-e), clip_high=math.exp(e) - 1)
    assert torch.allclose(a.loss(now).per_unit, b.loss(now).per_unit, atol=1e-6)


def test_gmpo_that_holds_nothing_is_gspo_that_clips_nothing() -> None:
    r = rollout()
    a = loss_of(gmpo(r, clip_log=9.0), r)
    b = loss_of(gspo(r, clip_low=1.0, clip_high=99.0), r)
    assert torch.allclose(a.per_unit, b.per_unit, atol=1e-6)

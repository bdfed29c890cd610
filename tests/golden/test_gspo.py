"""GSPO by hand; with answers of one token it is GRPO."""

from __future__ import annotations

import math

import pytest
import torch
from online_numbers import (
    ANSWERS,
    NEW,
    OLD,
    REWARD,
    loss_of,
    mean,
    rollout,
    std,
    surrogate,
    total,
)

from truing.core.objective import Measurements
from truing.train.rl.grpo import grpo
from truing.train.rl.gspo import gspo


def test_gspo_by_hand() -> None:
    r = rollout()
    per: list[float] = []
    for u, k in ANSWERS:
        a = (REWARD[u][k] - mean(REWARD[u])) / (std(REWARD[u]) + 1e-4)
        s = math.exp(mean([n - o for n, o in zip(NEW[u][k], OLD[u][k], strict=True)]))
        per.append(surrogate(s, a, 0.1, 0.15))
    loss = loss_of(gspo(r, clip_low=0.1, clip_high=0.15), r)
    assert total(loss) == pytest.approx(mean(per), rel=1e-5)


def test_answers_of_one_token_make_it_grpo() -> None:
    r = rollout()
    short = Measurements(
        torch.ones(2, 2, 1), {n: t[..., :1] for n, t in r.tensors.items()}, r.columns
    )
    a, b = gspo(short, clip_low=0.2, clip_high=0.2), grpo(short)
    moved = {
        **short.tensors,
        "old_logp": short["logp"],
        "logp": short["logp"] + torch.tensor([[[0.3], [-0.3]], [[0.1], [-0.1]]]),
    }
    one = Measurements(short.mask_UKT, moved, {**r.columns, **a.tensors})
    assert torch.equal(a.loss(one).per_unit, b.loss(one).per_unit)

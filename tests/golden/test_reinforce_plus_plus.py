"""REINFORCE++ by hand: returns to go with the KL in them, whitened over all tokens."""

from __future__ import annotations

import math

import pytest
from online_numbers import (
    ANSWERS,
    OLD,
    REF,
    REWARD,
    loss_of,
    mean,
    ratio,
    rollout,
    std,
    surrogate,
    tokens,
    total,
)

from truing.errors import InputError
from truing.train.rl.reinforce_plus_plus import reinforce_plus_plus


def returns(beta: float, baseline: bool) -> list[list[float]]:
    made: list[list[float]] = []
    for u, k in ANSWERS:
        score = REWARD[u][k] - (mean(REWARD[u]) if baseline else 0.0)
        steps = [-beta * (OLD[u][k][t] - REF[u][k][t]) for t in tokens(u, k)]
        steps[-1] += score
        made.append([sum(steps[t:]) for t in tokens(u, k)])
    return made


def test_a_baseline_needs_a_group() -> None:
    with pytest.raises(InputError, match="must be at least 2 with a baseline"):
        reinforce_plus_plus(rollout().branches(0), baseline=True)


@pytest.mark.parametrize("baseline", [False, True])
def test_by_hand(baseline: bool) -> None:
    r = rollout()
    found = returns(0.25, baseline)
    flat = [x for row in found for x in row]
    spread = math.sqrt(std(flat) ** 2 + 1e-8)
    white = [[(x - mean(flat)) / spread for x in row] for row in found]
    update = reinforce_plus_plus(r, beta=0.25, baseline=baseline)
    for (u, k), row in zip(ANSWERS, white, strict=True):
        assert update.tensors["advantage"][u, k, : len(row)].tolist() == pytest.approx(
            row, abs=1e-5
        )
        assert update.tensors["advantage"][u, k, len(row) :].abs().sum() == 0
    per = [
        surrogate(ratio(u, k, t), white[i][t], 0.2, 0.2)
        for i, (u, k) in enumerate(ANSWERS)
        for t in tokens(u, k)
    ]
    assert total(loss_of(update, r)) == pytest.approx(mean(per), rel=1e-4)

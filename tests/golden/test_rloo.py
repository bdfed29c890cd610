"""RLOO by hand: the others' mean as baseline, the KL in the reward, one ratio for each answer."""

from __future__ import annotations

import math

import pytest
from online_numbers import (
    ANSWERS,
    NEW,
    OLD,
    REF,
    REWARD,
    gradient,
    loss_of,
    mean,
    rollout,
    std,
    surrogate,
    total,
)

from truing.train.rl.rloo import rloo


def penalised(u: int, k: int, beta: float) -> float:
    return REWARD[u][k] - beta * (sum(OLD[u][k]) - sum(REF[u][k]))


def test_rloo_by_hand() -> None:
    r, beta = rollout(), 0.4
    a = {(u, k): penalised(u, k, beta) - penalised(u, 1 - k, beta) for u, k in ANSWERS}
    update = rloo(r, beta=beta)
    assert update.tensors["advantage"].flatten().tolist() == pytest.approx(
        [a[x] for x in ANSWERS], rel=1e-5, abs=1e-6
    )
    per = [
        surrogate(math.exp(sum(NEW[u][k]) - sum(OLD[u][k])), a[u, k], 0.2, 0.2) for u, k in ANSWERS
    ]
    assert total(loss_of(update, r)) == pytest.approx(mean(per), rel=1e-5)
    flat = [a[x] for x in ANSWERS]
    scaled = rloo(r, beta=beta, normalise=True).tensors["advantage"]
    wanted = [(x - mean(flat)) / (std(flat) + 1e-4) for x in flat]
    assert scaled.flatten().tolist() == pytest.approx(wanted, rel=1e-4, abs=1e-6)


def test_at_ratio_one_the_gradient_is_reinforce() -> None:
    r = rollout()
    got = gradient(loss_of(rloo(r, beta=0.0), r, now=OLD))
    for u, k in ANSWERS:
        n = len(OLD[u][k])
        wanted = -(REWARD[u][k] - REWARD[u][1 - k]) / 4
        assert got[u, k, :n].tolist() == pytest.approx([wanted] * n, rel=1e-5)


def test_a_long_way_from_where_an_answer_was_drawn() -> None:
    """Ratios of exp(90) and exp(-90): finite, and the one is still pushed down where it is bad."""
    r = rollout()
    for step, at in ((30.0, 20.0), (-30.0, -90.0)):
        now = [tuple([x + step for x in y] for y in row) for row in OLD]
        loss = loss_of(rloo(r, beta=0.0), r, now=now)  # type: ignore[arg-type]
        a = {(u, k): REWARD[u][k] - REWARD[u][1 - k] for u, k in ANSWERS}
        log = {(u, k): step * len(OLD[u][k]) for u, k in ANSWERS}
        near = {x: max(min(log[x], 20.0), at) for x in ANSWERS}
        beyond = {x: max(log[x] - 20.0, 0.0) for x in ANSWERS}  # along the tangent at 20
        ratio = {x: math.exp(near[x]) * (1 + beyond[x]) for x in ANSWERS}
        per = [surrogate(ratio[x], a[x], 0.2, 0.2) for x in ANSWERS]
        assert total(loss) == pytest.approx(mean(per), rel=1e-5)
        slope = gradient(loss)
        assert slope.isfinite().all() and (step < 0 or (slope > 0).any())

"""CISPO by hand: capped weights that are held constant."""

from __future__ import annotations

import pytest
from online_numbers import (
    ANSWERS,
    NEW,
    REWARD,
    gradient,
    loss_of,
    mean,
    ratio,
    rollout,
    std,
    tokens,
    total,
)

from truing.train.rl.cispo import cispo


def test_cispo_by_hand() -> None:
    r, cap = rollout(), 1.25
    per: list[float] = []
    slope: dict[tuple[int, int], list[float]] = {}
    for u, k in ANSWERS:
        a = (REWARD[u][k] - mean(REWARD[u])) / (std(REWARD[u]) + 1e-4)
        weights = [min(ratio(u, k, t), cap) for t in tokens(u, k)]
        per += [-w * a * x for w, x in zip(weights, NEW[u][k], strict=True)]
        slope[u, k] = [-w * a / 10 for w in weights]
    loss = loss_of(cispo(r, cap=cap), r)
    assert total(loss) == pytest.approx(mean(per), rel=1e-5)
    got = gradient(loss)
    for (u, k), wanted in slope.items():
        assert got[u, k, : len(wanted)].tolist() == pytest.approx(wanted, rel=1e-5)
    # exp(0.5) > 1.25 at one token of four answers' ten: the third and the fourth answer's.
    assert loss.metrics["clip_fraction"].tolist() == [[0.0, 0.5], [1.0, 0.5]]

"""WPO by hand; its weights are constants."""

from __future__ import annotations

import math

import pytest
from objective_numbers import LOGP, OTHER, D, pairs, sigma, softminus, values

from truing.train.preference.wpo import wpo

W = [
    math.prod(math.exp(sum(a - math.log(p2) for a, p2 in zip(y, o)) / len(y)) for y, o in zip(*row))
    for row in zip(LOGP, OTHER)
]


def test_by_hand() -> None:
    loss = wpo(pairs(), beta=0.3)
    assert values(loss) == pytest.approx([w * softminus(0.3 * d) for w, d in zip(W, D)], rel=1e-5)
    assert loss.metrics["on_policy"].tolist() == pytest.approx(W, rel=1e-5)


def test_weights_are_constants() -> None:
    m = pairs()
    wpo(m, beta=0.3).per_unit.sum().backward()
    assert m.logp_UKT.grad is not None and m["sum_p2"].grad is None
    expected = [-0.3 * w * sigma(-0.3 * d) for w, d in zip(W, D)]
    assert m.logp_UKT.grad[:, 0, 0].tolist() == pytest.approx(expected, rel=1e-5)

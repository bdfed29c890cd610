"""DiscoPOP by hand; its slope at the reference leads away from what is preferred."""

from __future__ import annotations

import math

import pytest
from objective_numbers import D, at_reference, pairs, sigma, softminus, values

from truing.train.preference.discopop import discopop


def test_by_hand() -> None:
    expected = []
    for d in D:
        z = 0.2 * d
        g = sigma(z / 0.5)
        expected.append((1 - g) * softminus(z) + g * math.exp(-z))
    assert values(discopop(pairs(), beta=0.2, tau=0.5)) == pytest.approx(expected, rel=1e-5)
    assert values(discopop(at_reference())) == pytest.approx([(math.log(2) + 1) / 2] * 3)


@pytest.mark.parametrize("tau", [0.05, 0.102, 0.2])
def test_slope_at_the_reference(tau: float) -> None:
    m = at_reference()
    discopop(m, beta=1.0, tau=tau).per_unit.sum().backward()
    assert m.logp_UKT.grad is not None
    slope = m.logp_UKT.grad[:, 0, 0].tolist()  # d z / d lp_w = 1
    assert slope == pytest.approx([(1 - math.log(2)) / (4 * tau) - 0.75] * 3, abs=1e-5)
    assert (slope[0] > 0) == (tau < (1 - math.log(2)) / 3)

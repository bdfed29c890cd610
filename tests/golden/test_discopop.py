"""DiscoPOP by hand; its slope at the reference leads away from what is preferred."""

from __future__ import annotations

import math

import pytest
import torch
from objective_numbers import D, at_reference, pairs, sigma, softminus, values

from truing.core.objective import Measurements
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


def at(z: float) -> Measurements:
    """One pair of one token each, whose log-ratios differ by z."""
    logp = torch.tensor([[[min(z, 0.0)], [min(-z, 0.0)]]]).requires_grad_()
    return Measurements(torch.ones(1, 2, 1), {"logp": logp, "ref_logp": torch.zeros(1, 2, 1)})


@pytest.mark.parametrize("z", [-200.0, -1000.0])
def test_far_below_0_it_is_the_logistic_loss(z: float) -> None:
    """There g = exp(20 z) is nothing beside exp(-z), and -logsigmoid(z) is -z."""
    m = at(z)
    made = discopop(m, beta=1.0)
    assert values(made) == [-z]
    made.per_unit.sum().backward()
    assert m.logp_UKT.grad is not None
    assert m.logp_UKT.grad[0, :, 0].tolist() == [-1.0, 1.0]


def test_where_the_exponential_has_no_end_it_is_clamped() -> None:
    """At tau = 2 the last term is exp(z / 2 - z)."""
    assert values(discopop(at(-100.0), beta=1.0, tau=2.0)) == pytest.approx(
        [100 + math.exp(50)], rel=1e-5
    )
    assert values(discopop(at(-1000.0), beta=1.0, tau=2.0)) == pytest.approx(
        [math.exp(80)], rel=1e-5
    )

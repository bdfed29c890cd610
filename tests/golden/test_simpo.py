"""SimPO and AlphaPO by hand; alpha = 0 is SimPO."""

from __future__ import annotations

import math

import pytest
import torch
from objective_numbers import mean, pairs, softminus, values

from truing.train.preference.simpo import alphapo, shaped, simpo


def test_simpo_by_hand() -> None:
    z = [2.5 * (mean(i, 0) - mean(i, 1)) - 1.2 for i in range(3)]
    found = simpo(pairs(), beta=2.5, gamma=1.2)
    assert values(found) == pytest.approx([softminus(x) for x in z], rel=1e-5)
    e = 0.2
    found = simpo(pairs(), beta=2.5, gamma=1.2, label_smoothing=e)
    assert values(found) == pytest.approx(
        [(1 - e) * softminus(x) + e * softminus(-x) for x in z], rel=1e-5
    )


def test_alphapo_by_hand() -> None:
    a = 0.4

    def reward(i: int, k: int) -> float:
        return (1 - math.exp(mean(i, k)) ** -a) / a

    z = [2.5 * (reward(i, 0) - reward(i, 1)) - 1.2 for i in range(3)]
    found = alphapo(pairs(), beta=2.5, gamma=1.2, alpha=a)
    assert values(found) == pytest.approx([softminus(x) for x in z], rel=1e-5)


def test_alpha_of_zero_is_simpo() -> None:
    plain = simpo(pairs()).per_unit
    assert torch.equal(alphapo(pairs(), alpha=0.0).per_unit, plain)
    assert torch.allclose(alphapo(pairs(), alpha=1e-4).per_unit, plain, atol=1e-3)


def test_alphapos_exponent_is_clamped() -> None:
    mean_lp = torch.tensor([-100.0, -1000.0]).requires_grad_()
    found = shaped(mean_lp, 0.25)
    assert found.tolist() == pytest.approx(
        [4 * (1 - math.exp(25)), 4 * (1 - math.exp(80))], rel=1e-5
    )
    found.sum().backward()
    assert mean_lp.grad is not None
    assert mean_lp.grad.tolist() == pytest.approx([math.exp(25), 0.0], rel=1e-5)

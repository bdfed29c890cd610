"""Exponentials that stay finite: their values, and whether they push back from far away."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from truing.core.passes.exponentials import exp_onwards, exp_up_to, expm1_up_to, parted


def slope(value: Tensor, x: Tensor) -> list[float]:
    (found,) = torch.autograd.grad(value.sum(), x)
    return found.tolist()


def test_by_hand() -> None:
    x = torch.tensor([-1.0, 1e-6, 3.0, 25.0, 500.0], requires_grad=True)
    flat = exp_up_to(x, 20.0)
    want = [math.exp(v) for v in (-1.0, 1e-6, 3.0, 20.0, 20.0)]
    assert flat.tolist() == pytest.approx(want, rel=1e-6)
    assert slope(flat, x) == pytest.approx([*want[:3], 0.0, 0.0], rel=1e-6)
    small = expm1_up_to(x)
    assert small.tolist()[1] == pytest.approx(1e-6, rel=1e-6) and small.isfinite().all()
    on = exp_onwards(x)
    far = math.exp(20.0)
    assert on.tolist() == pytest.approx([*want[:3], 6 * far, 481 * far], rel=1e-6)
    assert slope(on, x) == pytest.approx([*want[:3], far, far], rel=1e-6)  # it still pushes
    near, beyond = parted(x)
    assert near.tolist()[2:] == [3.0, 20.0, 20.0] and beyond.tolist()[2:] == [0.0, 5.0, 480.0]
    assert torch.equal(near + beyond, x)

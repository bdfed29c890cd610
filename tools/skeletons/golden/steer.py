"""My method on activations small enough to work out by hand."""

from __future__ import annotations

import pytest
import torch

from truing.method import methods

POSITIVE = torch.tensor([[1.0, 0.0], [3.0, 2.0]])
NEGATIVE = torch.tensor([[0.0, 1.0], [0.0, -1.0]])
EXPECTED: list[float] = []  # the direction, worked out by hand


def test_by_hand() -> None:
    assert EXPECTED, "write down the direction"
    found = methods["steer/my_method"].direction(POSITIVE, NEGATIVE)
    assert found.tolist() == pytest.approx(EXPECTED, rel=1e-6)

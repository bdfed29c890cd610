"""My method: advantages of a group small enough to work out by hand."""

from __future__ import annotations

import pytest
import torch

from truing.method import methods

REWARDS = torch.tensor([[1.0, 3.0, 8.0]])
EXPECTED: list[float] = []  # their advantages, worked out by hand


def test_by_hand() -> None:
    assert EXPECTED, "write down the advantages"
    found = methods["train/my_method"].advantages(REWARDS, torch.ones(1, 3))
    assert found[0].tolist() == pytest.approx(EXPECTED, rel=1e-6)

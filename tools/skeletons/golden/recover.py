"""My method on tensors small enough to repair by hand."""

from __future__ import annotations

import pytest
import torch

from truing.method import methods

DAMAGED, TRUSTED = torch.tensor([1.0, 0.0]), torch.tensor([3.0, -4.0])
EXPECTED: list[float] = []  # the repaired tensor, worked out by hand


def test_by_hand() -> None:
    assert EXPECTED, "write down the repaired tensor"
    found = methods["recover/my_method"].restored(DAMAGED, TRUSTED, 0.25)
    assert found.tolist() == pytest.approx(EXPECTED, rel=1e-6)

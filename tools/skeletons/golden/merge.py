"""My method on tensors small enough to merge by hand."""

from __future__ import annotations

import pytest
import torch

from truing.method import methods

ONE, TWO = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([3.0, 2.0, 0.5])
EXPECTED: list[float] = []  # their merger, worked out by hand


def test_by_hand() -> None:
    assert EXPECTED, "write down the merger of the two tensors"
    found = methods["merge/my_method"].combine([ONE, TWO])
    assert found.tolist() == pytest.approx(EXPECTED, rel=1e-6)

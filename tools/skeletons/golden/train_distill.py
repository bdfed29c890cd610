"""My method by hand, on a teacher and a student of three tokens."""

from __future__ import annotations

import pytest
import torch
from teaching import slopes

from truing.method import methods

TEACHER, STUDENT = [0.5, 0.25, 0.25], [0.125, 0.375, 0.5]
EXPECTED: list[float] = []  # the divergence of the two, worked out by hand or with `math`


def test_by_hand() -> None:
    assert EXPECTED, "write down the divergence of the two distributions"
    divergence = methods["train/my_method"].my_method_divergence
    student, teacher = torch.tensor([STUDENT]).log(), torch.tensor([TEACHER]).log()
    # `slopes` sets the slope beside that of autograd.
    found_C, _ = slopes(divergence, student, teacher_logp=teacher)
    assert found_C.tolist() == pytest.approx(EXPECTED, rel=1e-5)

"""NCA by hand; unlike DPO it sees absolute rewards."""

from __future__ import annotations

import math

import pytest
import torch
from objective_numbers import at_reference, pairs, r, softminus, values

from truing.train.preference.nca import nca


def test_by_hand() -> None:
    b = 0.6
    expected = [
        softminus(b * r(i, 0)) + 0.5 * softminus(-b * r(i, 0)) + 0.5 * softminus(-b * r(i, 1))
        for i in range(3)
    ]
    assert values(nca(pairs(), beta=b)) == pytest.approx(expected, rel=1e-6)


def test_at_the_reference() -> None:
    assert values(nca(at_reference())) == pytest.approx([2 * math.log(2)] * 3)


def test_a_common_shift_counts() -> None:
    m = pairs()
    shift = torch.zeros_like(m.logp_UKT)
    shift[:, :, 0] = 1.0
    assert not torch.allclose(nca(m).per_unit, nca(m.having(logp=m.logp_UKT + shift)).per_unit)

"""APO by hand."""

from __future__ import annotations

import pytest
from objective_numbers import at_reference, pairs, r, sigma, values

from truing.train.preference.apo import apo_down, apo_zero


def test_zero_by_hand() -> None:
    expected = [1 - sigma(0.7 * r(i, 0)) + sigma(0.7 * r(i, 1)) for i in range(3)]
    assert values(apo_zero(pairs(), beta=0.7)) == pytest.approx(expected, rel=1e-5)
    assert values(apo_zero(at_reference())) == pytest.approx([1.0] * 3)


def test_down_by_hand() -> None:
    expected = [sigma(0.7 * r(i, 0)) + 1 - sigma(0.7 * (r(i, 0) - r(i, 1))) for i in range(3)]
    assert values(apo_down(pairs(), beta=0.7)) == pytest.approx(expected, rel=1e-5)


def test_zero_raises_the_chosen_and_down_lowers_it() -> None:
    for loss, sign in ((apo_zero, -1), (apo_down, 1)):
        m = at_reference()
        loss(m).per_unit.sum().backward()
        slope = m.logp_UKT.grad
        assert slope is not None and (slope[:, 1, 0] > 0).all()
        if sign < 0:
            assert (slope[:, 0, 0] < 0).all()
        else:
            # sigmoid' counts once for and once against: flat at the reference, falling beyond it
            assert slope[:, 0, 0].abs().max() < 1e-7

"""IPO by hand, in both normalisations."""

from __future__ import annotations

import pytest
from objective_numbers import LOGP, D, at_reference, pairs, r, values

from truing.train.preference.ipo import ipo


def test_by_hand() -> None:
    d = [r(i, 0) / len(LOGP[i][0]) - r(i, 1) / len(LOGP[i][1]) for i in range(3)]
    expected = [(x - 1 / 0.4) ** 2 for x in d]
    assert values(ipo(pairs(), beta=0.2)) == pytest.approx(expected, rel=1e-5)


def test_textbook_form() -> None:
    expected = [(d - 1 / 0.4) ** 2 for d in D]
    found = ipo(pairs(), beta=0.2, length_normalise=False)
    assert values(found) == pytest.approx(expected, rel=1e-5)


def test_at_the_reference() -> None:
    assert values(ipo(at_reference(), beta=0.1)) == pytest.approx([1 / (4 * 0.01)] * 3)

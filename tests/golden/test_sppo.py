"""SPPO by hand, hard and soft."""

from __future__ import annotations

import pytest
from objective_numbers import at_reference, pairs, r, values

from truing.train.preference.sppo import sppo

HARD = {"win_chosen": [1.0] * 3, "win_rejected": [0.0] * 3}


def test_hard_by_hand() -> None:
    expected = [(r(i, 0) - 1 / 0.4) ** 2 + (r(i, 1) + 1 / 0.4) ** 2 for i in range(3)]
    assert values(sppo(pairs(**HARD), beta=0.2)) == pytest.approx(expected, rel=1e-5)


def test_soft_by_hand() -> None:
    win, lose = [0.9, 0.6, 0.5], [0.2, 0.4, 0.5]
    m = pairs(win_chosen=win, win_rejected=lose)
    expected = [
        (r(i, 0) - 5 * (win[i] - 0.5)) ** 2 + (r(i, 1) - 5 * (lose[i] - 0.5)) ** 2 for i in range(3)
    ]
    assert values(sppo(m, beta=0.2)) == pytest.approx(expected, rel=1e-5)


def test_at_the_reference() -> None:
    m = pairs(**HARD)
    same = at_reference()
    m = m.having(logp=same.logp_UKT)
    assert values(sppo(m, beta=0.1)) == pytest.approx([1 / (2 * 0.01)] * 3)

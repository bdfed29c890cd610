"""Imitation of the better answer of each group, by hand."""

from __future__ import annotations

import pytest
from online_numbers import NEW, gradient, loss_of, rollout, total

from truing.train.rl.bo2 import bo2


def test_by_hand() -> None:
    """Rewards 1 < 3 and 0.5 > -1: every token of the two better answers weighs the same."""
    r = rollout()
    loss = loss_of(bo2(r), r)
    tokens = [*NEW[0][1], *NEW[1][0]]
    assert total(loss) == pytest.approx(-sum(tokens) / len(tokens))
    slope = gradient(loss)
    assert slope[0, 0].abs().sum() == slope[1, 1].abs().sum() == 0
    assert slope[0, 1, :2].tolist() == pytest.approx([-1 / 3] * 2)
    assert slope[1, 0, 0].item() == pytest.approx(-1 / 3)


def test_ties_teach_nothing() -> None:
    r = rollout(reward=[[2.0, 2.0], [0.5, -1.0]])
    update = bo2(r)
    assert update.active_U is not None and update.active_U.tolist() == [False, True]
    loss = loss_of(update, r)
    assert total(loss) == pytest.approx(-NEW[1][0][0])
    assert gradient(loss)[0].abs().sum() == 0

"""Online DPO by hand: best against worst of each group."""

from __future__ import annotations

import math

import pytest
from online_numbers import NEW, REF, gradient, loss_of, rollout, total

from truing.train.rl.online_dpo import online_dpo


def r_of(u: int, k: int) -> float:
    return sum(NEW[u][k]) - sum(REF[u][k])


D = [r_of(0, 1) - r_of(0, 0), r_of(1, 0) - r_of(1, 1)]  # rewards: 1 < 3 and 0.5 > -1


def test_by_hand() -> None:
    r = rollout()
    loss = loss_of(online_dpo(r, beta=0.3), r)
    assert total(loss) == pytest.approx(sum(math.log1p(math.exp(-0.3 * d)) for d in D) / 2)
    square = loss_of(online_dpo(r, beta=0.3, kind="ipo"), r)
    assert total(square) == pytest.approx(sum((d - 1 / 0.6) ** 2 for d in D) / 2, rel=1e-5)


def test_ties_make_no_pair() -> None:
    r = rollout(reward=[[2.0, 2.0], [0.5, -1.0]])
    update = online_dpo(r, beta=0.3)
    assert update.active_U is not None and update.active_U.tolist() == [False, True]
    loss = loss_of(update, r)
    assert total(loss) == pytest.approx(math.log1p(math.exp(-0.3 * D[1])))
    assert gradient(loss)[0].abs().sum() == 0

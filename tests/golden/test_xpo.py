"""XPO by hand: DPO's loss of the pair, and the likelihood of the reference's answer."""

from __future__ import annotations

import math

import pytest
from online_numbers import NEW, REF, loss_of, rollout, total

from truing.train.rl.xpo import xpo


def test_by_hand() -> None:
    r = rollout(own=[[1.0, 0.0], [1.0, 0.0]])
    wanted = 0.0
    for u, (best, worst) in enumerate([(1, 0), (0, 1)]):
        up, down = (sum(NEW[u][k]) - sum(REF[u][k]) for k in (best, worst))
        wanted += math.log1p(math.exp(-0.3 * (up - down))) + 0.01 * sum(NEW[u][1])
    assert total(loss_of(xpo(r, beta=0.3, alpha=0.01), r)) == pytest.approx(wanted / 2, rel=1e-5)


def test_ties_keep_the_bonus() -> None:
    r = rollout(own=[[1.0, 0.0], [1.0, 0.0]], reward=[[1.0, 1.0], [1.0, 1.0]])
    bonus = 0.01 * (sum(NEW[0][1]) + sum(NEW[1][1])) / 2
    update = xpo(r, alpha=0.01)
    assert update.active_U is None and total(loss_of(update, r)) == pytest.approx(bonus, rel=1e-5)

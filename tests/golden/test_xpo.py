"""XPO by hand: DPO's loss of the pair, and the likelihood of the reference's answer."""

from __future__ import annotations

import math

import pytest
import torch
from online_numbers import NEW, REF, loss_of, rollout, total

from truing.core.objective import Measurements
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


def test_answers_of_one_player_are_never_a_pair() -> None:
    """Four answers, two of each: the extremes of the group are both the policy's."""
    r = rollout(own=[[1.0, 1.0], [0.0, 0.0]], reward=[[9.0, -9.0], [0.5, 0.25]])
    group = Measurements(
        r.mask_UKT.reshape(1, 4, 4),
        {n: t.reshape(1, 4, 4) for n, t in r.tensors.items()},
        {n: c.reshape(1, 4) for n, c in r.columns.items()},
    )
    update = xpo(group, beta=0.3, alpha=0.01)
    now = Measurements(
        group.mask_UKT,
        {
            **group.tensors,
            "logp": torch.tensor([[y + [9.0] * (4 - len(y)) for y in [*NEW[0], *NEW[1]]]]),
        },
        {**group.columns, **update.tensors},
    )
    ratio = [sum(n) - sum(f) for n, f in zip([*NEW[0], *NEW[1]], [*REF[0], *REF[1]], strict=True)]
    pairs = [(ratio[0], ratio[2]), (ratio[3], ratio[1])]  # 9 beats 0.5; 0.25 beats -9
    wanted = sum(math.log1p(math.exp(-0.3 * (w - u))) for w, u in pairs) / 2
    wanted += 0.01 * (sum(NEW[1][0]) + sum(NEW[1][1])) / 2
    assert total(update.loss(now)) == pytest.approx(wanted, rel=1e-5)


def test_ties_say_nothing_of_accuracy() -> None:
    r = rollout(own=[[1.0, 0.0], [1.0, 0.0]], reward=[[1.0, 1.0], [3.0, 1.0]])
    seen = {n: v.tolist() for n, v in loss_of(xpo(r, beta=0.3, alpha=0.01), r).metrics.items()}
    up, down = (0.3 * (sum(NEW[1][k]) - sum(REF[1][k])) for k in (0, 1))
    assert seen["accuracy"] == [float(up > down)]
    assert seen["margin"] == pytest.approx([up - down], rel=1e-5)
    r = rollout(own=[[1.0, 0.0], [1.0, 0.0]], reward=[[1.0, 1.0], [1.0, 1.0]])
    assert loss_of(xpo(r, alpha=0.01), r).sums()["accuracy"][1] == 0  # not recorded at all

"""RRHF by hand, with groups of different sizes."""

from __future__ import annotations

import pytest
import torch
from objective_numbers import values

from truing.core.objective import Measurements
from truing.train.preference.rrhf import rrhf

# two groups: three answers and two; the third of the second group does not exist
TOKENS = [([-0.5, -1.5], [-0.25], [-3.0, -1.0, -2.0]), ([-1.0, -0.5], [-0.5], [])]
SCORES = [[0.1, 0.9, 0.5], [1.0, 0.0, 0.0]]


def groups() -> Measurements:
    mask = torch.tensor([[[1.0] * len(y) + [0.0] * (3 - len(y)) for y in g] for g in TOKENS])
    logp = torch.tensor([[y + [5.0] * (3 - len(y)) for y in g] for g in TOKENS])
    return Measurements(mask, {"logp": logp.requires_grad_()}, {"scores": torch.tensor(SCORES)})


def test_by_hand() -> None:
    # means: -1, -0.25, -2 | -0.75, -0.5
    # first: order by score 0 < 2 < 1: relu(-1 + 2) + relu(-1 + .25) + relu(-2 + .25) = 1
    # second: 1 < 0: relu(-0.5 + 0.75) = 0.25
    loss = rrhf(groups(), lam=0.5)
    assert values(loss) == pytest.approx([1.0 + 0.5 * 0.25, 0.25 + 0.5 * 0.75])
    assert loss.metrics["accuracy"].tolist() == pytest.approx([2 / 3, 0.0])


def test_right_order_costs_nothing_and_wrong_pairs_have_unit_slope() -> None:
    m = groups()
    rrhf(m, lam=0.0).per_unit.sum().backward()
    slope = m.logp_UKT.grad
    assert slope is not None
    # one violated pair in each: up for the worse answer, down for the better, over their lengths
    assert slope[0, :, 0].tolist() == pytest.approx([0.5, 0.0, -1 / 3])
    assert slope[1, :, 0].tolist() == pytest.approx([-0.5, 1.0, 0.0])
    right = m.having(logp=-m.mask_UKT).columns | {"scores": torch.tensor([[1.0, 1, 1], [0, 0, 0]])}
    even = Measurements(m.mask_UKT, m.tensors, right)
    assert values(rrhf(even, lam=0.0)) == [0.0, 0.0]


def test_length_penalty() -> None:
    # sums: -2, -0.25, -6 | -1.5, -0.5
    assert values(rrhf(groups(), lam=0.0, penalty=0.0)) == pytest.approx([4.0, 1.0])

"""PRO by hand; two answers without gaps are Bradley-Terry on mean log-probabilities."""

from __future__ import annotations

import math

import pytest
import torch
from objective_numbers import mean, pairs, softminus, values

from truing.core.objective import Measurements
from truing.train.preference.pro import pro, ranking_loss


def test_two_answers() -> None:
    m = pairs()
    scores = torch.tensor([[1.0, 0.0]] * 3)
    two = Measurements(m.mask_UKT, m.tensors, {"scores": scores})
    expected = [softminus(mean(i, 0) - mean(i, 1)) for i in range(3)]
    assert values(pro(two, sft_weight=0.0, gaps=False)) == pytest.approx(expected, rel=1e-5)
    swapped = Measurements(m.mask_UKT, m.tensors, {"scores": 1 - scores})
    expected = [softminus(mean(i, 1) - mean(i, 0)) for i in range(3)]
    assert values(pro(swapped, sft_weight=0.0, gaps=False)) == pytest.approx(expected, rel=1e-5)


def test_three_answers_with_gaps_by_hand() -> None:
    p, s = [-0.4, -1.1, -0.7], [3.0, 1.0, 0.5]
    first = math.exp(p[0] * 2.5)
    first = -math.log(first / (first + math.exp(p[1] * 2.0) + math.exp(p[2] * 2.5)))
    second = math.exp(p[1] * 0.5)
    second = -math.log(second / (second + math.exp(p[2] * 0.5)))
    there = torch.ones(1, 3)
    found = ranking_loss(torch.tensor([p]), torch.tensor([s]), there, gaps=True)
    assert found.tolist() == pytest.approx([first + second], rel=1e-6)
    only_two = ranking_loss(
        torch.tensor([p]), torch.tensor([s]), torch.tensor([[1.0, 1.0, 0.0]]), gaps=True
    )
    assert only_two.tolist() == pytest.approx([softminus(2.0 * (p[0] - p[1]))], rel=1e-6)


def test_equal_scores_add_nothing() -> None:
    m = pairs()
    even = Measurements(m.mask_UKT, m.tensors, {"scores": torch.zeros(3, 2)})
    loss = pro(even, sft_weight=0.0)
    assert values(loss) == [0.0, 0.0, 0.0]
    loss.per_unit.sum().backward()
    assert m.logp_UKT.grad is not None and m.logp_UKT.grad.isfinite().all()


def test_likelihood_of_the_best() -> None:
    m = pairs()
    two = Measurements(m.mask_UKT, m.tensors, {"scores": torch.tensor([[0.0, 1.0]] * 3)})
    with_it, without = pro(two, sft_weight=0.1), pro(two, sft_weight=0.0)
    extra = (with_it.per_unit - without.per_unit).tolist()
    assert extra == pytest.approx([-0.1 * v for v in m.seq()[:, 1].tolist()], rel=1e-5)

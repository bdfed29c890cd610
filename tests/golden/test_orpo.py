"""ORPO by hand; odds of nearly certain answers stay finite."""

from __future__ import annotations

import math

import pytest
import torch
from objective_numbers import mean, nll, pairs, softminus, total

from truing.train.preference.orpo import log1m_exp, log_odds, orpo


def odds(i: int, k: int) -> float:
    p = math.exp(mean(i, k))
    return math.log(p / (1 - p))


def test_by_hand() -> None:
    gap = sum(softminus(odds(i, 0) - odds(i, 1)) for i in range(3)) / 3
    assert total(orpo(pairs(), beta=0.2)) == pytest.approx(nll() + 0.2 * gap, rel=1e-5)


def test_log1m_exp_is_exact() -> None:
    a = [-1e-6, -1e-3, -0.3, -0.6931, -0.6932, -2.0, -30.0]
    found = log1m_exp(torch.tensor(a, dtype=torch.float64)).tolist()
    assert found == pytest.approx([math.log(-math.expm1(x)) for x in a], rel=1e-12)
    certain = torch.tensor([0.0, -1e-9, -40.0], requires_grad=True)
    log_odds(certain).sum().backward()
    assert log_odds(certain).isfinite().all() and certain.grad is not None
    assert certain.grad.isfinite().all()

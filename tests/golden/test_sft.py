"""SFT and DFT by hand: the mean is over tokens, DFT's weights are constants."""

from __future__ import annotations

import math

import pytest
from objective_numbers import LOGP, nll, pairs, total

from truing.train.supervised.sft import dft, neftune, sft

TOKENS = [x for row in LOGP for x in row[0]]


def test_by_hand() -> None:
    assert total(sft(pairs().branches(0))) == pytest.approx(nll())
    assert nll() == pytest.approx(-sum(TOKENS) / len(TOKENS))
    assert total(neftune(pairs().branches(0))) == pytest.approx(nll())
    loss = dft(pairs().branches(0))
    assert total(loss) == pytest.approx(-sum(map(math.exp, TOKENS)) / len(TOKENS), rel=1e-6)
    weighted = [-sum(math.exp(x) * x for x in row[0]) / len(row[0]) for row in LOGP]
    assert loss.metrics["weighted_nll"].tolist() == pytest.approx(weighted, rel=1e-6)


def test_gradients_by_hand() -> None:
    for loss, slope in ((sft, lambda x: -1.0), (dft, lambda x: -math.exp(x))):
        m = pairs()
        loss(m.branches(0)).total().backward()
        assert m.logp_UKT.grad is not None
        for i, row in enumerate(LOGP):
            expected = [slope(x) / len(TOKENS) for x in row[0]]
            assert m.logp_UKT.grad[i, 0, : len(row[0])].tolist() == pytest.approx(expected)
        assert m.logp_UKT.grad[:, 1].abs().sum() == 0

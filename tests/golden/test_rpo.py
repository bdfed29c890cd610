"""RPO and MPO are sums of losses, each term with its own mean."""

from __future__ import annotations

import math

import pytest
from objective_numbers import D, at_reference, nll, pairs, r, softminus, total

from truing.train.preference.rpo import mpo, rpo

DPO = sum(softminus(0.3 * d) for d in D) / 3
BCO = sum(softminus(0.3 * r(i, 0)) + softminus(-0.3 * r(i, 1)) for i in range(3)) / 3


def test_rpo_by_hand() -> None:
    assert total(rpo(pairs(), beta=0.3, alpha=0.5)) == pytest.approx(DPO + 0.5 * nll())
    assert total(rpo(pairs(), beta=0.3, alpha=0.0)) == pytest.approx(DPO)


def test_mpo_by_hand() -> None:
    expected = 0.8 * DPO + 0.2 * BCO + 1.0 * nll()
    assert total(mpo(pairs(), beta=0.3)) == pytest.approx(expected, rel=1e-6)
    other = mpo(pairs(), beta=0.3, preference=2.0, quality=0.0, generation=0.25)
    assert total(other) == pytest.approx(2 * DPO + 0.25 * nll(), rel=1e-6)


def test_terms_keep_their_own_weights() -> None:
    terms = list(rpo(pairs(), alpha=0.5).terms())
    assert [(scale, float(w.sum())) for scale, _, w in terms] == [(1.0, 3.0), (0.5, 8.0)]
    dpo_part = next(iter(rpo(at_reference()).terms()))[1]
    assert dpo_part.tolist() == pytest.approx([math.log(2)] * 3)

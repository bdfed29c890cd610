"""RPO and MPO are sums of losses, each term with its own mean; `mix` makes the same of DPO."""

from __future__ import annotations

import math

import pytest
from objective_numbers import LOGP, D, at_reference, nll, pairs, r, softminus, total

from truing.core.objective import objective_of
from truing.core.trainer.mix import mixed
from truing.train.preference.dpo import dpo
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


def test_dpo_with_others_mixed_in_by_hand() -> None:
    found = mixed(objective_of(dpo), {"sft": 0.5})(pairs(), {"beta": 0.3})
    assert total(found) == pytest.approx(DPO + 0.5 * nll())
    assert total(found) == total(rpo(pairs(), beta=0.3, alpha=0.5))
    ipo = sum((r(i, 0) / len(LOGP[i][0]) - r(i, 1) / len(LOGP[i][1]) - 2.5) ** 2 for i in range(3))
    mix: dict[str, object] = {"dpo": 0.8, "bco_pair": {"weight": 0.2, "beta": 0.3}, "sft": 1}
    mix["ipo"] = {"weight": 0.1, "beta": 0.2}  # its target is 1 / (2 beta)
    found = mixed(objective_of(dpo), mix)(pairs(), {"beta": 0.3})
    expected = 0.8 * DPO + 0.2 * BCO + nll() + 0.1 * ipo / 3
    assert total(found) == pytest.approx(expected, rel=1e-6)


def test_terms_keep_their_own_weights() -> None:
    terms = list(rpo(pairs(), alpha=0.5).terms())
    assert [(scale, float(w.sum())) for scale, _, w in terms] == [(1.0, 3.0), (0.5, 8.0)]
    dpo_part = next(iter(rpo(at_reference()).terms()))[1]
    assert dpo_part.tolist() == pytest.approx([math.log(2)] * 3)

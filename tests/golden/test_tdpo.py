"""TDPO by hand; the second form sends no gradient through the chosen answer's divergence."""

from __future__ import annotations

import pytest
from objective_numbers import OTHER, D, pairs, softminus, values

from truing.train.preference.tdpo import tdpo1, tdpo2

KL = [(sum(w), sum(x)) for w, x in OTHER]


def test_by_hand() -> None:
    first = [softminus(0.3 * (d - (kl[1] - kl[0]))) for d, kl in zip(D, KL)]
    assert values(tdpo1(pairs(), beta=0.3)) == pytest.approx(first, rel=1e-5)
    second = [softminus(0.3 * (d - 0.7 * (kl[1] - kl[0]))) for d, kl in zip(D, KL)]
    assert values(tdpo2(pairs(), beta=0.3, alpha=0.7)) == pytest.approx(second, rel=1e-5)


def test_gradients_through_the_divergences() -> None:
    for loss, through in ((tdpo1, True), (tdpo2, False)):
        m = pairs()
        kl = m["ref_kl_vocab"].clone().requires_grad_()
        loss(m.having(ref_kl_vocab=kl)).per_unit.sum().backward()
        assert kl.grad is not None and (kl.grad[:, 1, 0] > 0).all()
        assert bool((kl.grad[:, 0, 0] < 0).all()) is through

"""DPO and its one-term variants by hand, and what equals what."""

from __future__ import annotations

import math

import pytest
import torch
from objective_numbers import LOGP, D, at_reference, pairs, r, sigma, softminus, values

from truing.errors import InputError
from truing.method import methods
from truing.train.preference.dpo import cdpo, dpo, dpo_norm, hinge, robust_dpo


def test_dpo_by_hand() -> None:
    # (-3.75 + 3.25) - (-2.25 + 2.0) = -0.25 and so on
    assert D == [-0.25, 3.75, 4.375]
    loss = dpo(pairs(), beta=0.3)
    assert values(loss) == pytest.approx([softminus(0.3 * d) for d in D], rel=1e-6)
    assert loss.metrics["margin"].tolist() == pytest.approx([0.3 * d for d in D], rel=1e-5)
    assert loss.metrics["accuracy"].tolist() == [float(d > 0) for d in D]
    assert loss.metrics["reward_chosen"].tolist() == pytest.approx(
        [0.3 * r(i, 0) for i in range(3)]
    )
    assert loss.metrics["logp_chosen"].tolist() == pytest.approx([sum(y[0]) for y in LOGP])


def test_gradient_by_hand() -> None:
    m = pairs()
    dpo(m, beta=0.3).per_unit.sum().backward()
    slope = m.logp_UKT.grad
    assert slope is not None
    for i, d in enumerate(D):
        g = -0.3 * sigma(-0.3 * d)
        for k, sign in ((0, 1.0), (1, -1.0)):
            n = len(LOGP[i][k])
            assert slope[i, k, :n].tolist() == pytest.approx([sign * g] * n, rel=1e-5)
            assert slope[i, k, n:].abs().sum() == 0


def test_variants_by_hand() -> None:
    b, e = 0.4, 0.2
    z = [b * d for d in D]
    assert values(cdpo(pairs(), beta=b, label_smoothing=e)) == pytest.approx(
        [(1 - e) * softminus(x) + e * softminus(-x) for x in z], rel=1e-6
    )
    assert values(robust_dpo(pairs(), beta=b, label_smoothing=e)) == pytest.approx(
        [((1 - e) * softminus(x) - e * softminus(-x)) / (1 - 2 * e) for x in z], rel=1e-5
    )
    assert values(hinge(pairs(), beta=b)) == pytest.approx([max(0.0, 1 - x) for x in z], abs=1e-6)
    per_token = [r(i, 0) / len(LOGP[i][0]) - r(i, 1) / len(LOGP[i][1]) for i in range(3)]
    assert values(dpo_norm(pairs(), beta=b)) == pytest.approx(
        [softminus(b * d) for d in per_token], rel=1e-6
    )


def test_at_the_reference() -> None:
    m = at_reference()
    assert values(dpo(m)) == pytest.approx([math.log(2)] * 3)
    assert values(hinge(m)) == pytest.approx([1.0] * 3)


def test_smoothing_of_zero_is_dpo() -> None:
    plain = dpo(pairs(), beta=0.7).per_unit
    for variant in (cdpo, robust_dpo):
        assert torch.allclose(variant(pairs(), beta=0.7, label_smoothing=0.0).per_unit, plain)


def test_robust_is_unbiased_and_cdpo_settles() -> None:
    e, beta = 0.3, 0.5
    flipped = pairs().branches(1, 0)
    clean = robust_dpo(pairs(), beta=beta, label_smoothing=e).per_unit
    wrong = robust_dpo(flipped, beta=beta, label_smoothing=e).per_unit
    assert torch.allclose((1 - e) * clean + e * wrong, dpo(pairs(), beta=beta).per_unit, atol=1e-5)
    d = math.log((1 - e) / e) / beta
    m = at_reference()
    shift = torch.zeros_like(m.logp_UKT)
    shift[:, 0, 0] = d
    at_minimum = (m.ref_logp_UKT + shift).requires_grad_()
    cdpo(m.having(logp=at_minimum), beta=beta, label_smoothing=e).per_unit.sum().backward()
    assert at_minimum.grad is not None and at_minimum.grad.abs().max() < 1e-6


def test_depends_on_the_difference_only() -> None:
    m = pairs()
    shift = torch.zeros_like(m.logp_UKT)
    shift[:, :, 0] = 1.7
    moved = m.having(logp=m.logp_UKT + shift)
    for loss in (dpo, hinge):
        assert torch.allclose(loss(m).per_unit, loss(moved).per_unit, atol=1e-6)


def test_smoothing_out_of_range() -> None:
    for variant in (cdpo, robust_dpo):
        with pytest.raises(InputError, match="label_smoothing"):
            variant(pairs(), label_smoothing=0.5)


def test_reached_through_the_registry() -> None:
    method = methods["dpo"]
    assert method.loss is dpo and method.id == "train/dpo"
    assert values(method.loss(pairs(), beta=0.3)) == values(dpo(pairs(), beta=0.3))
    assert {"beta", "lr", "epochs", "rank"} <= set(method.settings)

"""CISPO, SAPO and VESPO by hand: capped weights, a smooth gate, a weight of the whole answer."""

from __future__ import annotations

import math

import pytest
import torch
from online_numbers import (
    ANSWERS,
    NEW,
    OLD,
    REWARD,
    A,
    gradient,
    loss_of,
    mean,
    ratio,
    rollout,
    std,
    tokens,
    total,
)

from truing.errors import InputError
from truing.method import methods
from truing.train.rl.cispo import cispo, gated, sapo, vespo


def test_cispo_by_hand() -> None:
    r, cap = rollout(), 1.25
    per: list[float] = []
    slope: dict[tuple[int, int], list[float]] = {}
    for u, k in ANSWERS:
        a = (REWARD[u][k] - mean(REWARD[u])) / (std(REWARD[u]) + 1e-4)
        weights = [min(ratio(u, k, t), cap) for t in tokens(u, k)]
        per += [-w * a * x for w, x in zip(weights, NEW[u][k], strict=True)]
        slope[u, k] = [-w * a / 10 for w in weights]
    loss = loss_of(cispo(r, cap=cap), r)
    assert total(loss) == pytest.approx(mean(per), rel=1e-5)
    got = gradient(loss)
    for (u, k), wanted in slope.items():
        assert got[u, k, : len(wanted)].tolist() == pytest.approx(wanted, rel=1e-5)
    # exp(0.5) > 1.25 at one token of four answers' ten: the third and the fourth answer's.
    assert loss.metrics["clip_fraction"].tolist() == [[0.0, 0.5], [1.0, 0.5]]


def test_sapo_by_hand() -> None:
    r = rollout()
    per: list[float] = []
    slope: dict[tuple[int, int], list[float]] = {}
    for u, k in ANSWERS:
        a = A[u][k]
        tau = 1.0 if a > 0 else 1.05
        gate = [1 / (1 + math.exp(-tau * (ratio(u, k, t) - 1))) for t in tokens(u, k)]
        per.append(mean([-4 / tau * g * a for g in gate]))
        # d ratio / d logp = ratio, d sigmoid = g (1 - g), and tau cancels.
        slope[u, k] = [
            -4 * g * (1 - g) * ratio(u, k, t) * a / len(gate) / 4 for t, g in enumerate(gate)
        ]
    loss = loss_of(sapo(r), r)
    assert total(loss) == pytest.approx(mean(per), rel=1e-5)
    got = gradient(loss)
    for (u, k), wanted in slope.items():
        assert got[u, k, : len(wanted)].tolist() == pytest.approx(wanted, rel=1e-5)


def test_sapo_at_ratio_one_is_reinforce() -> None:
    r = rollout()
    got = gradient(loss_of(sapo(r), r, now=OLD))
    for u, k in ANSWERS:
        n = len(OLD[u][k])
        assert got[u, k, :n].tolist() == pytest.approx([-A[u][k] / n / 4] * n, rel=1e-5)


def test_sapo_far_away_has_no_gradient_and_stays_finite() -> None:
    r = rollout()
    update = sapo(r)
    for shift in (5.0, 200.0, -200.0):
        now = [tuple([x + shift for x in y] for y in row) for row in OLD]
        got = gradient(loss_of(update, r, now=now))  # type: ignore[arg-type]
        assert got.isfinite().all() and got.abs().max() < 1e-12


def test_sapo_counts_no_advantage_as_nothing() -> None:
    r = rollout()
    m = loss_of(sapo(r), r).given  # type: ignore[attr-defined]
    flat = type(m)(m.mask_UKT, m.tensors, {**m.columns, "advantage": torch.zeros(2, 2)})
    assert gated(flat, 1.0, 1.05).abs().sum() == 0
    with pytest.raises(InputError, match="tau_negative"):
        methods["sapo"].check({"tau_negative": 0.0}, {})


def test_vespo_by_hand() -> None:
    r = rollout()
    per: list[float] = []
    slope: dict[tuple[int, int], list[float]] = {}
    for u, k in ANSWERS:
        a = A[u][k]
        power, lam = (2.0, 3.0) if a >= 0 else (3.0, 2.0)
        w = math.exp(sum(NEW[u][k]) - sum(OLD[u][k]))
        phi = math.exp(lam + power * math.log(w) - lam * w)
        per += [-phi * a * x for x in NEW[u][k]]
        slope[u, k] = [-phi * a / 10] * len(NEW[u][k])
    loss = loss_of(vespo(r), r)
    assert total(loss) == pytest.approx(mean(per), rel=1e-5)
    got = gradient(loss)
    for (u, k), wanted in slope.items():
        assert got[u, k, : len(wanted)].tolist() == pytest.approx(wanted, rel=1e-5)


def test_vespo_at_ratio_one_is_reinforce() -> None:
    r = rollout()
    loss = loss_of(vespo(r), r, now=OLD)
    assert loss.metrics["answer_weight"].tolist() == [[1.0, 1.0], [1.0, 1.0]]
    got = gradient(loss)
    for u, k in ANSWERS:
        n = len(OLD[u][k])
        assert got[u, k, :n].tolist() == pytest.approx([-A[u][k] / 10] * n, rel=1e-5)


def test_vespo_without_a_shape_is_cispo_of_ratio_one() -> None:
    """k = lam = 0 leaves -A log pi."""
    r = rollout()
    plain = {"k_positive": 0.0, "lam_positive": 0.0, "k_negative": 0.0, "lam_negative": 0.0}
    a, b = loss_of(vespo(r, **plain), r, now=OLD), loss_of(cispo(r), r, now=OLD)
    assert torch.allclose(a.per_unit, b.per_unit)


def test_vespo_fades_on_both_sides() -> None:
    r = rollout()
    update = vespo(r)
    for shift in (4.0, 200.0, -30.0, -200.0):
        now = [tuple([x + shift for x in y] for y in row) for row in OLD]
        phi = loss_of(update, r, now=now).metrics["answer_weight"]  # type: ignore[arg-type]
        assert phi.isfinite().all() and phi.max() < 1e-6

"""Losses of pairs with ties: by hand, as probabilities, and where they are Bradley-Terry."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from objective_numbers import values
from test_bradley_terry import L, W, scored

from truing.core.objective import Loss, Measurements
from truing.errors import InputError
from truing.train.reward.bradley_terry import bradley_terry
from truing.train.reward.tied_pairs import davidson, rao_kupper

TIES, NONE = [0.0, 1.0, 0.0], [0.0] * 3
few = settings(max_examples=60, derandomize=True, deadline=None, database=None)
score = st.floats(-8, 8)


def test_davidson_by_hand() -> None:
    made = davidson(scored(W, L, tie=TIES), nu=0.5)
    want: list[float] = []
    for w, x, tie in zip(W, L, TIES, strict=True):
        middle = 0.5 * math.exp((w + x) / 2)
        z = math.exp(w) + math.exp(x) + middle
        want.append(-math.log((middle if tie else math.exp(w)) / z))
    assert values(made) == pytest.approx(want, rel=1e-5)


def test_rao_kupper_by_hand() -> None:
    made = rao_kupper(scored(W, L, tie=TIES), theta=1.5)
    want: list[float] = []
    for w, x, tie in zip(W, L, TIES, strict=True):
        a, b = math.exp(w), math.exp(x)
        tied = (1.5**2 - 1) * a * b / ((a + 1.5 * b) * (b + 1.5 * a))
        want.append(-math.log(tied if tie else a / (a + 1.5 * b)))
    assert values(made) == pytest.approx(want, rel=1e-5)
    assert made.metrics["accuracy"].tolist() == [1, 0, 1]


def test_equal_scores_tie_in_one_case_of_three_by_default() -> None:
    for loss in (davidson, rao_kupper):
        assert values(loss(scored(W, W, tie=[1.0] * 3))) == pytest.approx([math.log(3)] * 3)
        assert values(loss(scored(W, W, tie=NONE))) == pytest.approx([math.log(3)] * 3)


def probability(loss: Callable[..., Loss], w: float, x: float, tie: float, **how: float) -> float:
    return math.exp(-values(loss(scored([w], [x], tie=[tie]), **how))[0])


@few
@given(score, score, st.floats(1.01, 20))
def test_win_tie_and_loss_are_all_that_can_be(w: float, x: float, weight: float) -> None:
    for loss, name in ((rao_kupper, "theta"), (davidson, "nu")):
        how = {name: weight}
        win, lost = (probability(loss, a, b, 0.0, **how) for a, b in ((w, x), (x, w)))
        tied, turned = (probability(loss, a, b, 1.0, **how) for a, b in ((w, x), (x, w)))
        assert win + lost + tied == pytest.approx(1, abs=1e-5)
        assert tied == pytest.approx(turned, rel=1e-4)  # which is called chosen says nothing


def slope(loss: Loss, m: Measurements) -> torch.Tensor:
    loss.total().backward()
    found = m["scores"].grad
    assert found is not None
    return found


@few
@given(st.lists(st.tuples(score, score), min_size=1, max_size=5))
def test_without_room_for_ties_both_are_bradley_terry(pairs: list[tuple[float, float]]) -> None:
    w, x = [p[0] for p in pairs], [p[1] for p in pairs]
    none = [0.0] * len(pairs)
    plain = scored(w, x, margin=none)
    want = bradley_terry(plain)
    down = slope(want, plain)
    for loss, how in ((rao_kupper, {"theta": 1.0}), (davidson, {"nu": 0.0})):
        m = scored(w, x, tie=none)
        made = loss(m, **how)
        assert torch.allclose(made.per_unit, want.per_unit, atol=1e-5)
        assert torch.allclose(slope(made, m), down, atol=1e-6)


def test_a_tie_draws_the_scores_together() -> None:
    for loss in (davidson, rao_kupper):
        m = scored([2.0], [-1.0], tie=[1.0])
        down = -slope(loss(m), m)[0, :, 1]
        assert down[0] < 0 < down[1] and float(down.sum()) == pytest.approx(0, abs=1e-6)


def test_ties_need_room() -> None:
    for loss, name, none in ((davidson, "nu", 0.0), (rao_kupper, "theta", 1.0)):
        with pytest.raises(InputError, match=f"'{name}' must be above"):
            loss(scored(W, L, tie=TIES), **{name: none})
        with pytest.raises(InputError, match=f"'{name}' must be above"):
            loss(scored(W, L, tie=NONE), **{name: none - 0.5})

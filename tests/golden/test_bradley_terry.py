"""Reward objectives by hand, and the cases in which they are Bradley-Terry."""

from __future__ import annotations

import math

import pytest
import torch
from objective_numbers import LOGP, OTHER, mask_of, padded, softminus, total, values

from truing.core.objective import Measurements, objective_of
from truing.errors import InputError
from truing.train.reward.bradley_terry import (
    bradley_terry,
    classify_pairs,
    plackett_luce,
    score_answers,
)
from truing.train.reward.demonstrations import reward_from_demos
from truing.train.reward.guard import guard

W, L = [0.5, -1.0, 2.0], [0.25, 1.5, -0.5]


def scored(*branches: list[float], **columns: list[float] | list[list[float]]) -> Measurements:
    """Scores at the last of two tokens; what lies elsewhere may not be looked at."""
    last = torch.tensor(branches).T
    scores = torch.stack([torch.full_like(last, 5.0), last, torch.full_like(last, 9.0)], -1)
    mask = torch.tensor([1.0, 1, 0]).expand_as(scores).clone()
    mask[last.isnan()] = 0
    tensors = {"scores": scores.nan_to_num(7.0).requires_grad_()}
    return Measurements(mask, tensors, {n: torch.tensor(c) for n, c in columns.items()})


def test_pairs_by_hand() -> None:
    m = scored(W, L, margin=[0.0, 0.5, 1.0])
    want = [
        softminus(w - x - g) + 0.1 * (w + x) ** 2 for w, x, g in zip(W, L, (0, 0.5, 1), strict=True)
    ]
    made = bradley_terry(m, centring=0.1)
    assert values(made) == pytest.approx(want, rel=1e-5)
    assert made.metrics["accuracy"].tolist() == [1, 0, 1]
    made.total().backward()
    slope = m["scores"].grad
    assert slope is not None and slope[..., 0].abs().sum() == slope[..., 2].abs().sum() == 0
    want = [softminus(w) + softminus(-x) for w, x in zip(W, L, strict=True)]
    assert values(classify_pairs(scored(W, L))) == pytest.approx(want, rel=1e-5)


def test_a_constant_of_the_prompt_is_not_seen_and_equal_scores_give_ln_2() -> None:
    zero = [0.0] * 3
    moved = scored([w + 3 for w in W], [x + 3 for x in L], margin=zero)
    plain = scored(W, L, margin=zero)
    assert torch.allclose(bradley_terry(moved).per_unit, bradley_terry(plain).per_unit, atol=1e-6)
    assert values(bradley_terry(scored(W, W, margin=zero))) == pytest.approx([math.log(2)] * 3)


def test_imitation_of_the_chosen_answer() -> None:
    tensors = {"scores": padded(OTHER), "logp": padded(LOGP).requires_grad_()}
    m = Measurements(mask_of(LOGP), tensors, {"margin": torch.zeros(3)})
    ranked = sum(softminus(w[-1] - x[-1]) for w, x in OTHER) / 3
    spoken = sum(-sum(w) / len(w) for w, _ in LOGP) / 3
    made = bradley_terry(m, imitation=0.7)
    assert total(made) == pytest.approx(ranked + 0.7 * spoken, rel=1e-5)
    made.total().backward()
    slope = m["logp"].grad
    assert slope is not None and slope[:, 1].abs().sum() == 0
    assert slope[0, 0, :3].tolist() == pytest.approx([-0.7 / 9] * 3, rel=1e-5)
    assert total(bradley_terry(m)) == pytest.approx(ranked, rel=1e-5)
    spec = objective_of(bradley_terry)
    assert spec.asked({"imitation": 0.0}) == ("scores",)
    assert spec.asked({"imitation": 0.5}) == ("scores", "logp") and not spec.answers_end
    with pytest.raises(InputError, match="imitation"):
        bradley_terry(m, imitation=-1.0)


def test_lists() -> None:
    s = [[0.5, -1.0], [2.0, 0.25], [-0.5, math.nan]]  # the second group has two answers
    m = scored(*s, scores=[[1.0, 3.0, 2.0], [0.2, 0.1, 0.0]])
    e = [math.exp(x) for x in (2.0, -0.5, 0.5)]  # best first
    first = -math.log(e[0] / sum(e)) - math.log(e[1] / (e[1] + e[2]))
    made = plackett_luce(m)
    assert values(made) == pytest.approx([first, softminus(-1.0 - 0.25)], rel=1e-5)
    made.total().backward()
    slope = m["scores"].grad
    assert slope is not None and slope.isfinite().all() and slope[1, 2].abs().sum() == 0
    two = plackett_luce(scored(W, L, scores=[[1.0, 0.0]] * 3)).per_unit
    pair = bradley_terry(scored(W, L, margin=[0.0] * 3)).per_unit
    assert torch.allclose(two, pair, atol=1e-6)


def test_equal_scores_in_lists_do_not_rank_by_their_place() -> None:
    one = scored([0.5], [2.0], [-0.5], scores=[[1.0, 1.0, 0.0]])
    among = math.log(sum(math.exp(x) for x in (0.5, 2.0, -0.5)))
    assert values(plackett_luce(one)) == pytest.approx([2 * among - 2.5], rel=1e-5)
    turned = scored([2.0], [0.5], [-0.5], scores=[[1.0, 1.0, 0.0]])
    assert values(plackett_luce(turned)) == pytest.approx(values(plackett_luce(one)), rel=1e-6)


def test_single_answers() -> None:
    made = guard(scored(W, label=[1.0, 0.0, 0.0]), bad_weight=3.0)
    want = [softminus(0.5), softminus(1.0), softminus(-2.0)]
    assert values(made) == pytest.approx(want, rel=1e-5)
    assert total(made) == pytest.approx((want[0] + 3 * want[1] + 3 * want[2]) / 7, rel=1e-5)
    assert made.metrics["accuracy"].tolist() == [1, 1, 0]
    made = score_answers(scored(W, score=[0.0, 1.0, 2.0]))
    assert values(made) == pytest.approx([0.25, 4.0, 0.0])


def test_demonstrations() -> None:
    gone = [0.0, math.nan, 1.0]
    made = reward_from_demos(scored(W, L, gone))
    want = [
        (softminus(0.25) + softminus(0.5)) / 2,
        softminus(-2.5),
        (softminus(2.5) + softminus(1.0)) / 2,
    ]
    assert values(made) == pytest.approx(want, rel=1e-5)
    one = reward_from_demos(scored(W, L)).per_unit
    pair = bradley_terry(scored(W, L, margin=[0.0] * 3)).per_unit
    assert torch.allclose(one, pair)

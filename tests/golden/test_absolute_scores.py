"""The anchored reward loss by hand, and what it is for: the part that pairs share."""

from __future__ import annotations

import math

import pytest
import torch
from objective_numbers import softminus, values
from torch import nn

from truing.core.batch.training_rows import Reader
from truing.core.objective import Measurements, objective_of
from truing.core.tiny import tiny_tokenizer
from truing.errors import InputError
from truing.tables import Row, Table
from truing.train.reward.absolute_scores import absolute_scores
from truing.train.reward.bradley_terry import bradley_terry

NONE = -math.inf  # what a reader puts for a score that a row does not give
W, L = [0.5, -1.0, 2.0], [0.25, 1.5, -0.5]


def scored(w: torch.Tensor, l: torch.Tensor, **columns: torch.Tensor) -> Measurements:  # noqa: E741
    scores = torch.stack([w, l], 1)[..., None]
    return Measurements(torch.ones_like(scores), {"scores": scores}, columns)


def by_hand(chosen: list[float], rejected: list[float]) -> Measurements:
    t = torch.tensor
    return scored(t(W), t(L), score_chosen=t(chosen), score_rejected=t(rejected))


def test_by_hand() -> None:
    made = absolute_scores(by_hand([0.75, NONE, 1.0], [0.0, 0.5, NONE]), alpha=2.0)
    want = [
        softminus(0.25) + 2 * (0.25**2 + 0.25**2),
        softminus(-2.5) + 2 * 1.0**2,  # the chosen answer has no score
        softminus(2.5) + 2 * 1.0**2,
    ]
    assert values(made) == pytest.approx(want, rel=1e-6)


def test_alpha_0_and_rows_without_scores_are_bradley_terry() -> None:
    none = [NONE] * 3
    t = torch.tensor
    plain = values(bradley_terry(scored(t(W), t(L), margin=torch.zeros(3))))
    assert values(absolute_scores(by_hand(none, none))) == plain
    assert values(absolute_scores(by_hand([0.5] * 3, [0.1] * 3), alpha=0.0)) == plain


def test_mistakes() -> None:
    with pytest.raises(InputError, match="score_rejected"):
        absolute_scores(by_hand([0.5] * 3, [0.1, 7.0, 0.2]))
    with pytest.raises(InputError, match="alpha"):
        absolute_scores(by_hand([0.5] * 3, [0.1] * 3), alpha=-1.0)
    for wrong in (-1.0, -0.25):  # of annotators who count from another zero
        with pytest.raises(InputError, match=r"lies in \[0, 1\]"):
            absolute_scores(by_hand([0.5, wrong, 0.5], [0.1] * 3))


def test_scores_that_are_missing_have_no_term_and_no_gradient() -> None:
    rows: list[Row] = [
        {"prompt": "p", "chosen": "a", "rejected": "b", **more}
        for more in ({}, {"score_chosen": None, "score_rejected": math.nan}, {"score_chosen": 0.5})
    ]
    spec = objective_of(absolute_scores)
    units = Reader(tiny_tokenizer(), spec, 64).read(Table("pair", rows))
    assert [[u.numbers[n] for n in spec.columns] for u in units] == [
        [NONE, NONE], [NONE, NONE], [0.5, NONE],
    ]  # fmt: skip
    w, l = (torch.tensor(v, requires_grad=True) for v in (W, L))  # noqa: E741
    none = torch.tensor([NONE] * 3)
    some = torch.tensor([0.25, NONE, NONE])
    absolute_scores(scored(w, l, score_chosen=some, score_rejected=none)).total().backward()
    assert w.grad is not None and l.grad is not None
    slope = torch.sigmoid(torch.tensor(L) - torch.tensor(W)) / 3
    assert torch.allclose(l.grad, slope) and torch.allclose(w.grad[1:], -slope[1:])
    assert float(w.grad[0]) == pytest.approx(float(-slope[0]) + 2 * (W[0] - 0.25) / 3, abs=1e-6)
    with pytest.raises(InputError, match="finite number"):
        Reader(tiny_tokenizer(), spec, 64).read(Table("pair", [{**rows[2], "score_chosen": "x"}]))


def pearson_of(alpha: float) -> float:
    """Correlation of a small net's score with the latent one, over prompts and answers.

    Both answers of a pair share their prompt, whose part of the score pairs alone never show.
    """
    source = torch.Generator().manual_seed(0)

    def draw(n: int) -> torch.Tensor:
        return torch.randn(n, 4, generator=source)

    axis_p, axis_y = draw(1), draw(1)

    def latent(p: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid((p * axis_p).sum(1) + (y * axis_y).sum(1))

    prompt, a, b = draw(400), draw(400), draw(400)
    s_a, s_b = latent(prompt, a), latent(prompt, b)
    first = (s_a > s_b)[:, None]
    w, l = torch.where(first, a, b), torch.where(first, b, a)  # noqa: E741
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(100):
        r_w, r_l = (net(torch.cat([prompt, y], 1))[:, 0] for y in (w, l))
        m = scored(r_w, r_l, score_chosen=latent(prompt, w), score_rejected=latent(prompt, l))
        optimizer.zero_grad()
        absolute_scores(m, alpha=alpha).total().backward()
        optimizer.step()
    p, y = draw(300), draw(300)
    with torch.no_grad():
        r = net(torch.cat([p, y], 1))[:, 0]
    return float(torch.corrcoef(torch.stack([r, latent(p, y)]))[0, 1])


def test_scores_show_what_answers_to_one_prompt_share() -> None:
    with_scores, without = pearson_of(1.0), pearson_of(0.0)
    assert math.isfinite(without) and with_scores > without + 0.1

"""The anchored reward loss by hand, and what it is for: the part that pairs share."""

from __future__ import annotations

import math

import pytest
import torch
from objective_numbers import softminus, values
from torch import nn

from truing.core.objective import Measurements
from truing.errors import InputError
from truing.train.reward.absolute_scores import absolute_scores
from truing.train.reward.bradley_terry import bradley_terry

W, L = [0.5, -1.0, 2.0], [0.25, 1.5, -0.5]


def scored(w: torch.Tensor, l: torch.Tensor, **columns: torch.Tensor) -> Measurements:  # noqa: E741
    scores = torch.stack([w, l], 1)[..., None]
    return Measurements(torch.ones_like(scores), {"scores": scores}, columns)


def by_hand(chosen: list[float], rejected: list[float]) -> Measurements:
    t = torch.tensor
    return scored(t(W), t(L), score_chosen=t(chosen), score_rejected=t(rejected))


def test_by_hand() -> None:
    made = absolute_scores(by_hand([0.75, -1.0, 1.0], [0.0, 0.5, -1.0]), alpha=2.0)
    want = [
        softminus(0.25) + 2 * (0.25**2 + 0.25**2),
        softminus(-2.5) + 2 * 1.0**2,  # the chosen answer has no score
        softminus(2.5) + 2 * 1.0**2,
    ]
    assert values(made) == pytest.approx(want, rel=1e-6)


def test_alpha_0_and_rows_without_scores_are_bradley_terry() -> None:
    none = [-1.0] * 3
    t = torch.tensor
    plain = values(bradley_terry(scored(t(W), t(L), margin=torch.zeros(3))))
    assert values(absolute_scores(by_hand(none, none))) == plain
    assert values(absolute_scores(by_hand([0.5] * 3, [0.1] * 3), alpha=0.0)) == plain


def test_mistakes() -> None:
    with pytest.raises(InputError, match="score_rejected"):
        absolute_scores(by_hand([0.5] * 3, [0.1, 7.0, 0.2]))
    with pytest.raises(InputError, match="alpha"):
        absolute_scores(by_hand([0.5] * 3, [0.1] * 3), alpha=-1.0)


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

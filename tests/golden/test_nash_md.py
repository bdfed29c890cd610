"""Nash-MD by hand, and what the mixture's answers are drawn from."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
from online_numbers import NEW, REF, gradient, loss_of, rollout, total

from truing.core.generation.model_mixture import Alongside
from truing.core.sampling import SamplingSettings, sample
from truing.core.tiny import tiny_model
from truing.train.rl.nash_md import nash_md


def test_by_hand() -> None:
    r = rollout(own=[[1.0, 0.0], [1.0, 0.0]])
    update = nash_md(r, beta=0.3)
    loss = loss_of(update, r)
    wanted = 0.0
    slopes: list[list[float]] = []
    for u, gap in enumerate([1.0 - 3.0, 0.5 + 1.0]):
        gain = 1 / (1 + math.exp(-gap)) - 0.5
        apart = [n - f for n, f in zip(NEW[u][0], REF[u][0], strict=True)]
        wanted += 0.3 * sum(a * n for a, n in zip(apart, NEW[u][0])) - gain * sum(NEW[u][0])
        slopes.append([(0.3 * a - gain) / 2 for a in apart])
        assert float(loss.metrics["kl_sum"][u, 0]) == pytest.approx(sum(apart), rel=1e-5)
        assert float(loss.metrics["score"][u, 0]) == pytest.approx(gain * sum(NEW[u][0]), rel=1e-5)
    # Recorded as means over the policy's own answers: the opponent's are no part of them.
    sums, counts = zip(*(loss.sums()[n] for n in ("kl_sum", "score")), strict=True)
    assert counts == (2.0, 2.0)
    assert 0.3 * float(sums[0]) - float(sums[1]) != 0
    assert total(loss) == pytest.approx(wanted / 2, rel=1e-5)
    got = gradient(loss)
    for u, row in enumerate(slopes):
        assert got[u, 0, : len(row)].tolist() == pytest.approx(row, rel=1e-5)
    assert got[:, 1].abs().sum() == 0  # nothing is learnt from the opponent's answer


def test_the_mixture_is_geometric() -> None:
    """Greedy answers of the mixture: the argmax of the mixed logits, token by token."""
    (one, _), (two, _) = tiny_model(0), tiny_model(1)
    prompts = [[70, 80, 90], [70, 80, 91, 92]]
    hook = Alongside(two, nullcontext, 0.4, 6)
    settings = SamplingSettings(max_tokens=6, greedy=True, n=2)
    for prompt, group in zip(prompts, sample(one, prompts, settings, logits=hook), strict=True):
        ids = list(prompt)
        for token in group[0].ids:
            with torch.no_grad():
                z = [m(torch.tensor([ids])).logits[0, -1] for m in (one, two)]
            assert token == int((0.6 * z[0] + 0.4 * z[1]).argmax())
            ids.append(token)
        assert group[1].ids == group[0].ids

"""Divergences from a teacher by hand; their slopes; the student at its teacher."""

from __future__ import annotations

import math

import pytest
import torch
from teaching import drawn, rows, slopes

from truing.core.objective import Measurements
from truing.train.distill.forward_kl import (
    forward_kl,
    on_policy_kd,
    reverse_kl,
    teacher_forward_kl,
    teacher_reverse_kl,
)

T, S = [0.5, 0.25, 0.25], [0.125, 0.375, 0.5]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def test_by_hand() -> None:
    student, teacher = torch.tensor([S]).log(), torch.tensor([T]).log()
    forward, slope = slopes(teacher_forward_kl, student, teacher_logp=teacher)
    assert float(forward) == pytest.approx(kl(T, S), abs=1e-6)
    assert slope[0].tolist() == pytest.approx([s - t for s, t in zip(S, T, strict=True)], abs=1e-6)
    reverse, _ = slopes(teacher_reverse_kl, student, teacher_logp=teacher)
    assert float(reverse) == pytest.approx(kl(S, T), abs=1e-6)


def test_nothing_to_learn_at_the_teacher() -> None:
    logits = drawn(0)
    for statistic in (teacher_forward_kl, teacher_reverse_kl):
        value, slope = statistic(rows(logits, teacher_logp=logits.log_softmax(1)), True)
        assert slope is not None
        assert value.abs().max() < 1e-12 and slope.abs().max() < 1e-12
        value, _ = slopes(statistic, logits, teacher_logp=drawn(1).log_softmax(1))
        assert (value > 0).all()


def test_the_mean_is_over_the_tokens_of_the_step() -> None:
    mask = torch.tensor([[[1.0, 1, 1]], [[1, 0, 0]]])
    value = torch.tensor([[[0.1, 0.2, 0.6]], [[0.5, 9, 9]]])
    for loss in (forward_kl, reverse_kl, on_policy_kd):
        name = "teacher_forward_kl" if loss is forward_kl else "teacher_reverse_kl"
        made = loss(Measurements(mask, {name: value}))
        assert float(made.total()) == pytest.approx(1.4 / 4)
        assert made.metrics["kl"].flatten().tolist() == pytest.approx([0.3, 0.5])

"""The divergence over kept tokens and the rest by hand; the dense limit; the three terms."""

from __future__ import annotations

import math

import pytest
import torch
from objective_numbers import LOGP, OTHER, nll, pairs, total
from teaching import drawn, slopes
from test_forward_kl import kl

from truing.train.distill.dckd import dckd, teacher_top_kl
from truing.train.distill.forward_kl import teacher_forward_kl


def kept(teacher: torch.Tensor, k: int) -> dict[str, torch.Tensor]:
    logp, ids = teacher.log_softmax(1).topk(k)
    return {"teacher_ids": ids, "teacher_logp": logp}


def test_by_hand() -> None:
    t, s = [0.5, 0.25, 0.15, 0.1], [0.2, 0.2, 0.5, 0.1]
    student, teacher = torch.tensor([s]).log(), torch.tensor([t]).log()
    value, _ = slopes(teacher_top_kl, student, **kept(teacher, 2))
    assert float(value) == pytest.approx(kl([0.5, 0.25, 0.25], [0.2, 0.2, 0.6]), abs=1e-6)


def test_all_tokens_kept_is_the_dense_divergence() -> None:
    student, teacher = drawn(4), drawn(5)
    dense, dense_slope = slopes(teacher_forward_kl, student, teacher_logp=teacher.log_softmax(1))
    value, slope = slopes(teacher_top_kl, student, **kept(teacher, 7))
    assert torch.allclose(value, dense, atol=1e-6) and torch.allclose(slope, dense_slope, atol=1e-6)


def test_nothing_to_learn_at_the_teacher_and_names_of_tokens_do_not_matter() -> None:
    student, teacher = drawn(6), drawn(7)
    value, slope = slopes(teacher_top_kl, teacher, **kept(teacher, 3))
    assert value.abs().max() < 1e-9 and slope.abs().max() < 1e-9
    order = torch.tensor([3, 1, 6, 0, 2, 5, 4])
    value, slope = slopes(teacher_top_kl, student, **kept(teacher, 3))
    again, turned = slopes(teacher_top_kl, student[:, order], **kept(teacher[:, order], 3))
    assert torch.allclose(value, again) and torch.allclose(slope[:, order], turned)


def test_the_floor_ends_the_gradient() -> None:
    student = torch.tensor([[0.0, -40.0, -1.0]], dtype=torch.float64)
    teacher = torch.tensor([[0.2, 0.7, 0.1]], dtype=torch.float64).log()
    value, slope = slopes(teacher_top_kl, student, **kept(teacher, 2))
    s = student.softmax(1)[0].tolist()
    want = kl([0.2, 0.7, 0.1], [s[0], 1e-7, s[2]])
    assert float(value) == pytest.approx(want, abs=1e-6) and float(slope[0, 1].abs()) < 1e-12


def test_three_terms_by_hand() -> None:
    m = pairs()
    m = m.having(teacher_top_kl=m["sum_p2"])
    want = [sum(sum(row[k]) for row in OTHER) / sum(len(row[k]) for row in LOGP) for k in (0, 1)]
    made = dckd(m, sft_weight=0.5, chosen_weight=2.0, rejected_weight=3.0)
    assert total(made) == pytest.approx(0.5 * nll() + 2 * want[0] + 3 * want[1], rel=1e-6)
    assert made.metrics["kl_rejected"].tolist() == pytest.approx(
        [sum(row[1]) / len(row[1]) for row in OTHER]
    )
    assert math.isfinite(total(dckd(m)))

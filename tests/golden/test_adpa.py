"""Advantages with their floors by hand; the gradient of the expected advantage; its limits."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from objective_numbers import nll, pairs, total
from teaching import drawn, rows, slopes

from truing.context import Context, use
from truing.core.logprob import Rows
from truing.core.tiny import tiny_folder
from truing.method import methods
from truing.models import Model
from truing.tables import Table
from truing.train.distill.adpa import adpa, advantages, teacher_advantage

ALL = torch.arange(7).expand(5, 7)


def teachers(a: torch.Tensor, b: torch.Tensor) -> dict[str, torch.Tensor]:
    """Extras of two teachers that keep all tokens."""
    return {
        "teacher_ids": ALL,
        "teacher_logp": a.log_softmax(1),
        "teacher_reference_ids": ALL,
        "teacher_reference_logp": b.log_softmax(1),
    }


def test_advantages_by_hand() -> None:
    ids, ref_ids = torch.tensor([[4, 2, 9]]), torch.tensor([[2, 7, 4]])
    logp = torch.tensor([[0.5, 0.25, 1e-3]]).log()
    ref = torch.tensor([[0.125, 0.5, 1e-12]]).log()
    found = advantages(ids, logp, ref_ids, ref)[0].tolist()
    # 4 is raised to 1e-7 in the reference; 9 is not kept there and takes the teacher's smallest.
    want = [math.log(0.5 / 1e-7), math.log(0.25 / 0.125), 0.0]
    assert found == pytest.approx(want, abs=1e-4)


def test_expected_advantage_and_its_slope() -> None:
    student, extras = drawn(1), teachers(drawn(2), drawn(3))
    value, slope = slopes(teacher_advantage, student, **extras)
    a = extras["teacher_logp"] - extras["teacher_reference_logp"]
    p = student.softmax(1)
    mean = (p * a).sum(1)
    assert torch.allclose(value, mean) and torch.allclose(slope, p * (a - mean[:, None]))


def test_equal_teachers_teach_nothing() -> None:
    value, slope = slopes(teacher_advantage, drawn(4), **teachers(drawn(5), drawn(5)))
    assert value.abs().max() == 0 and slope.abs().max() == 0


def test_names_of_tokens_do_not_matter() -> None:
    """Of either teacher three tokens are kept, so that some have no value at the reference."""

    def kept(order: torch.Tensor) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for i, role in enumerate(("teacher", "teacher_reference")):
            logp, ids = drawn(7 + i)[:, order].log_softmax(1).topk(3)
            found |= {f"{role}_ids": ids, f"{role}_logp": logp}
        return found

    student, order = drawn(6), torch.tensor([3, 1, 6, 0, 2, 5, 4])
    value, slope = slopes(teacher_advantage, student, **kept(torch.arange(7)))
    again, turned = slopes(teacher_advantage, student[:, order], **kept(order))
    assert torch.allclose(value, again) and torch.allclose(slope[:, order], turned)


def test_one_kept_token_is_the_gradient_of_its_probability() -> None:
    student = drawn(9)
    ids = torch.tensor([[2]] * 5)
    extras = {
        "teacher_ids": ids,
        "teacher_logp": torch.zeros(5, 1).double(),
        "teacher_reference_ids": ids,
        "teacher_reference_logp": torch.full((5, 1), -1.0).double(),
    }
    leaf = student.clone().requires_grad_()
    (want,) = torch.autograd.grad(leaf.softmax(1)[:, 2].sum(), leaf)
    made: Rows = rows(student, **extras)
    slope = teacher_advantage(made, True)[1]
    assert slope is not None and torch.allclose(slope, want)


def test_two_terms_by_hand() -> None:
    m = pairs()
    m = m.having(teacher_advantage=m["sum_p2"])
    # The second branch is the student's own: 0.3 0.07 | 0.6 0.15 0.33 0.04 | 0.12 0.4 0.08
    own = (0.37 + 1.12 + 0.6) / 9
    made = adpa(m, gamma=2.0, sft_weight=0.5)
    assert total(made) == pytest.approx(0.5 * nll() - 2 * own, rel=1e-5)
    assert made.metrics["advantage"].tolist() == pytest.approx([0.185, 0.28, 0.2])


def test_refreshed_answers_are_shown_to_the_teachers_as_well(
    tiny_path: Path, tmp_path: Path
) -> None:
    taught = {
        role: Model.open(tiny_folder(tmp_path / role, seed=seed))
        for seed, role in enumerate(("teacher", "teacher_reference"), 1)
    }
    data = Table("example", [{"prompt": f"say {w}", "completion": w} for w in ("oak", "fern")])
    how = {"steps": 3, "lr": 0.02, "max_tokens": 6, "warmup": 0.0, "rank": 4}
    losses: list[list[float]] = []
    for refresh in (0, 2):
        with use(Context(folder=tmp_path / str(refresh))) as context:
            methods["adpa"](Model.open(tiny_path), data, refresh=refresh, **taught, **how)
        losses.append([float(str(m["loss"])) for m in context.metrics if "loss" in m])
    kept, anew = losses
    assert anew[:2] == pytest.approx(kept[:2], rel=1e-5) and anew[2] != pytest.approx(kept[2])

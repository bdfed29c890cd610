"""Process rewards: the loss, every aggregation and the rewards of steps by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from objective_numbers import softminus, total

from truing.context import Context, use
from truing.core.judging.answer_steps import AGGREGATES, steps_of
from truing.core.objective import Measurements
from truing.errors import InputError
from truing.method import methods
from truing.models import Model
from truing.tables import Table
from truing.train.reward.process_reward import min_rewards, process_reward, prod_rewards

S = [[1.0, -0.5, 2.0], [0.25]]


def steps(labels: list[list[float]]) -> Measurements:
    mask = torch.tensor([[[1.0, 1, 1]], [[1, 0, 0]]])
    scores = torch.tensor([[S[0]], [[S[1][0], 9.0, -9.0]]])
    return Measurements(mask, {"scores": scores}, {"labels": torch.tensor(labels)})


def test_loss_by_hand() -> None:
    want = [softminus(1.0), softminus(0.5), 0.5 * (softminus(2.0) + softminus(-2.0))]
    made = process_reward(steps([[1.0, 0.0, 0.5], [1.0, 0, 0]]))
    assert total(made) == pytest.approx((sum(want) + softminus(0.25)) / 4, rel=1e-6)
    assert made.metrics["accuracy"].tolist() == pytest.approx([2 / 3, 1.0])
    # A rating of 0 counts as right, one of -1 as wrong; columns may be wider or narrower.
    rated = process_reward(steps([[0.0, -1.0, 1.0, 0.0], [1.0, 0, 0, 0]]), ratings=True)
    want = [softminus(1.0), softminus(0.5), softminus(2.0), softminus(0.25)]
    assert total(rated) == pytest.approx(sum(want) / 4, rel=1e-6)


def test_ratings_are_not_taken_for_shares() -> None:
    with pytest.raises(InputError, match=r"shares from 0 to 1.*ratings=true"):
        process_reward(steps([[0.0, -1.0, 1.0], [1.0, 0, 0]]))


def test_aggregations() -> None:
    p = [0.5, 0.25, 0.75]
    assert {n: f(p) for n, f in AGGREGATES.items()} == {
        "min": 0.25,
        "prod": 0.09375,
        "mean": 0.5,
        "last": 0.75,
    }
    assert all(f([0.3]) == pytest.approx(0.3) for f in AGGREGATES.values())


def test_step_rewards_by_hand() -> None:
    assert min_rewards([0.75, 0.25, 0.5], bonus=0.0) == [0.0, -0.25, 0.0]
    # Products 0.8, 0.4, 0.2: nothing until the product falls below one half.
    assert prod_rewards([0.8, 0.5, 0.5], bonus=0.3) == pytest.approx([0.1, 0.0, -0.1])


def test_steps_of_text() -> None:
    assert steps_of("a\n\n\n\nb\n\n") == ["a", "b"] and steps_of("a; b", "; ") == ["a", "b"]


def test_a_wrong_label_is_named_by_its_row_before_training(tiny_path: Path, tmp_path: Path) -> None:
    """Of many rows the one whose label the loss refuses, as the file has it."""
    rows = [{"prompt": f"add {i}", "steps": ["one", "two"], "labels": [1, 0]} for i in range(300)]
    rows[270]["labels"] = [1, 3]
    path = tmp_path / "steps.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    with (
        use(Context(folder=tmp_path)),
        pytest.raises(InputError, match="shares from 0 to 1") as error,
    ):
        methods["process_reward"](Model.open(tiny_path), Table.read(path), steps=1, batch=2)
    assert "row 271" in error.value.where and "steps.jsonl" in error.value.where

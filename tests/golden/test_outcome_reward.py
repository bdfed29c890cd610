"""Outcome and outcome-and-process reward models: the loss by hand, which tokens carry it, a run."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from objective_numbers import softminus, total

from truing.context import Context, use
from truing.core.batch.reading import read_units
from truing.core.batch.training_rows import Unit
from truing.core.chat import prompt_ids, step_ids
from truing.core.objective import Measurements, objective_of
from truing.core.passes.scoring import head_scores, step_scores
from truing.core.tree import Node
from truing.errors import InputError
from truing.method import methods
from truing.models import Model
from truing.tables import Row, Table
from truing.train.reward.outcome_reward import (
    EveryToken,
    outcome_process_reward,
    outcome_reward,
    spread,
)

S = [[1.0, -0.5, 2.0], [0.25, -3.0]]


def scores(**columns: list[float] | list[list[float]]) -> Measurements:
    """Two solutions of three and two tokens; 9.0 at padding, which nothing may look at."""
    mask = torch.tensor([[[1.0, 1, 1]], [[1, 1, 0]]])
    made = torch.tensor([[S[0]], [[*S[1], 9.0]]])
    return Measurements(mask, {"scores": made}, {n: torch.tensor(c) for n, c in columns.items()})


def test_every_token_has_the_label_of_the_whole() -> None:
    made = outcome_reward(scores(label=[1.0, 0.0]))
    want = sum(softminus(s) for s in S[0]) + sum(softminus(-s) for s in S[1])
    assert total(made) == pytest.approx(want / 5, rel=1e-6)
    assert made.metrics["accuracy"].tolist() == pytest.approx([2 / 3, 1 / 2])


def test_every_token_has_the_label_of_its_step() -> None:
    labels = [[1.0, 1.0, 0.0], [0.5, 0.0, 0.0]]
    want = softminus(1.0) + softminus(-0.5) + softminus(-2.0)
    want += 0.5 * (softminus(0.25) + softminus(-0.25)) + softminus(3.0)
    # Columns may be wider than the scores of a micro-batch, or narrower.
    for wide in (labels, [[*row, 0.0, 0.0] for row in labels]):
        made = outcome_process_reward(scores(labels=wide))
        assert total(made) == pytest.approx(want / 5, rel=1e-6)
    assert made.metrics["accuracy"].tolist() == pytest.approx([1 / 3, 1 / 2])
    whole = outcome_process_reward(scores(labels=[[1.0] * 3, [0.0] * 3]))
    assert total(whole) == pytest.approx(total(outcome_reward(scores(label=[1.0, 0.0]))))
    with pytest.raises(InputError, match="shares from 0 to 1"):
        outcome_process_reward(scores(labels=[[1.0, -1.0, 0.0], [0.0, 0.0, 0.0]]))


def test_a_step_is_spread_over_its_tokens() -> None:
    # Two tokens of prompt, steps of two and one tokens, and one of a step that was cut.
    loss = (False, False, False, True, True, False)
    unit = Unit("a", (), (), {"labels": [0.25, 1.0]}, Node((5, 6, 7, 8, 9, 10), loss))
    made = spread(unit, 2)
    assert made.dialogue == Node((5, 6, 7, 8, 9, 10), (False, False, True, True, True, False))
    assert made.numbers["labels"] == [0.25, 0.25, 1.0]


def test_no_token_of_the_prompt_carries_loss(tiny_path: Path) -> None:
    model = Model.open(tiny_path)
    loaded = model.load_module()
    steps = ["one and two", "three"]
    row: Row = {"prompt": "count", "steps": steps, "labels": [1.0, 0.0]}
    spec = objective_of(outcome_process_reward)
    (unit,), _ = read_units(spec, loaded, Table("steps", [row]), 512, EveryToken())
    head = len(prompt_ids(loaded.tokenizer, "count"))
    sizes = [len(piece) for piece in step_ids(loaded.tokenizer, steps, "\n\n")]
    assert unit.dialogue is not None
    assert unit.dialogue.loss == (False,) * head + (True,) * sum(sizes)
    assert unit.numbers["labels"] == [1.0] * sizes[0] + [0.0] * sizes[1]


def test_what_is_taught_is_told_apart(tiny_path: Path, tmp_path: Path) -> None:
    words = "lime oak rain stone".split()
    whole: list[Row] = []
    parts: list[Row] = []
    for w in words:
        for good in (True, False):
            text = f"{w} yes" if good else f"{w} no"
            whole.append({"prompt": f"say {w}", "completion": text, "label": good})
            parts.append({"prompt": f"say {w}", "steps": [w, text], "labels": [1.0, float(good)]})
            parts.append({"prompt": f"say {w}", "steps": [w, text], "labels": [float(good)] * 2})
    model = Model.open(tiny_path)
    with use(Context(folder=tmp_path)):
        settings = {"steps": 60, "lr": 5e-3, "rank": 4}
        orm = methods["outcome_reward"](model, Table("unpaired", whole), **settings)
        oprm = methods["outcome_process_reward"](model, Table("steps", parts), **settings)
    assert isinstance(orm, Model) and isinstance(oprm, Model)
    assert [s > 0 for s in head_scores(orm, whole)] == [r["label"] for r in whole]
    found = step_scores(oprm, parts[::2], "\n\n")
    assert all((last > 0) == row["labels"][1] for (_, last), row in zip(found, parts[::2]))  # type: ignore[index]
    # A first step is right in three rows of four, whatever follows: odds of three.
    assert [first for first, _ in found] == pytest.approx([math.log(3)] * 8, abs=0.3)

"""A run from which nothing can be learnt says so, and one that learns does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from truing.method import methods
from truing.models import Model
from truing.tables import Row, Table

PROMPTS = Table("prompt", [{"prompt": f"say {w}"} for w in ("lime", "oak", "rain", "ash")])
SMALL: dict[str, object] = {
    "steps": 2, "batch": 2, "answers": 3, "rank": 2, "max_tokens": 4, "max_length": 64,
}  # fmt: skip
END = "grpo: warning: the gradient was 0 in all "


def same(rows: list[Row]) -> list[float]:
    return [0.25] * len(rows)


def letters(rows: list[Row]) -> list[float]:
    return [float(sum(map(ord, str(r["completion"])))) for r in rows]


@pytest.mark.parametrize(
    "more",
    [
        {"rewards": {"l": same}},
        {"rewards": {"l": same}, "refill": 1},
        {"rewards": {"l": letters}, "weights": {"l": 0.0}},
    ],
)
def test_rewards_that_tell_nothing_apart(
    more: dict[str, object], tiny_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    methods["grpo"](Model.open(tiny_path), PROMPTS, **SMALL, **more)
    said = capsys.readouterr().err
    assert said.count(END) == 1
    if "refill" not in more:  # which leaves no group over that could be looked at
        each = 0 if "weights" in more else 0.25
        assert said.count("nothing is learnt from rollout") == 1
        assert f"rollout 1 (all answers of a group have one reward; rewards are {each})" in said


def test_a_loss_without_weight(tiny_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = Table("pair", [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2)
    model = Model.open(tiny_path)
    methods["dpo"](model, pairs, beta=0.0, steps=2, batch=2, rank=2)
    assert "dpo: warning: the gradient was 0 in all 2 updates" in capsys.readouterr().err
    methods["dpo"](model, pairs, steps=2, batch=2, rank=2)
    methods["grpo"](model, PROMPTS, **SMALL, rewards={"l": letters})
    said = capsys.readouterr().err
    assert "the gradient was 0" not in said and "nothing is learnt" not in said

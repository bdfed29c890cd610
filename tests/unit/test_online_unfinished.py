"""Answers that were cut off and are dropped: counted, and said once where nothing else is left."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from truing.context import Context, Json, use
from truing.method import methods
from truing.models import Model
from truing.tables import Table

METHODS = ("grpo", "dr_grpo", "dapo", "gdpo", "gspo")
PROMPTS = Table("prompt", [{"prompt": f"say {w}"} for w in ("lime", "oak", "rain", "ash")])
SMALL: dict[str, object] = {
    "steps": 3, "batch": 2, "answers": 3, "lr": 2e-3, "refill": 0, "rank": 4,
    "rewards": {"letters": {"use": "share_of", "letters": "abcdefghijklmnop"}},
}  # fmt: skip
SAID = "warning: all 6 answers of rollout 1 were cut off"


@pytest.fixture
def model(shallow_path: Path) -> Model:
    return Model.open(shallow_path)


def run(name: str, model: Model, folder: Path, **more: object) -> tuple[Model, list[Json]]:
    with use(Context(seed=4, folder=folder)) as context:
        made = methods[name](model, PROMPTS, **SMALL, **more)
    assert isinstance(made, Model)
    return made, [m.get("dropped") for m in context.metrics if "length" in m]


@pytest.mark.parametrize("name", METHODS)
def test_all_cut_off_is_said_once(
    name: str, model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, shares = run(name, model, tmp_path / "a", drop_unfinished=True, max_tokens=2)
    said = [line for line in capsys.readouterr().err.splitlines() if "were cut off" in line]
    assert shares == [1.0] * 3 and len(said) == 1
    assert said[0].startswith(f"{name}: {SAID}") and "raise max_tokens" in said[0]
    before, after = model.folded(), made.folded()
    assert all(torch.equal(before[n], after[n]) for n in before)  # nothing is learnt
    if name == METHODS[0]:
        _, shares = run(name, model, tmp_path / "b", max_tokens=2)
        assert shares == [None] * 3 and "were cut off" not in capsys.readouterr().err


def test_some_that_ended_are_learnt_from(
    model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, shares = run("gdpo", model, tmp_path, drop_unfinished=True, max_tokens=48)
    assert all(0.0 < float(str(s)) < 1.0 for s in shares), shares
    assert "were cut off" not in capsys.readouterr().err
    before, after = model.folded(), made.folded()
    assert any(not torch.equal(before[n], after[n]) for n in before)

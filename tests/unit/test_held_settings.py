"""Models and principles may stand in a reference as they are: they are held under their keys."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from truing.context import Context, use
from truing.core.judging.rewards import score_model
from truing.core.passes.scoring import ScoreHead
from truing.method import methods, score
from truing.models import Model, hold
from truing.principles import Principle, Principles
from truing.references import referred
from truing.tables import Row, Table

ROWS: list[Row] = [{"prompt": "say a", "completion": "a"}, {"prompt": "say b", "completion": "no"}]


@pytest.fixture
def reward(tiny_path: Path, tmp_path: Path) -> Model:
    head = ScoreHead(128)
    with torch.no_grad():
        head.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(3))
    return head.added_to(Model.open(tiny_path), tmp_path / "head")


def test_a_reward_takes_a_model_as_it_is(reward: Model, tiny_path: Path, tmp_path: Path) -> None:
    want = score_model(reward, ROWS)
    assert score("reward", {"use": "reward_model", "model": reward}, ROWS) == pytest.approx(want)
    asked, told = Table("prompt", [{"prompt": "say a"}]), dict[str, object]()
    rules = {"good": {"use": "reward_model", "model": reward}}
    with use(Context(folder=tmp_path / "step")) as context:
        methods["rloo"](
            Model.open(tiny_path), asked, rewards=rules, steps=1, answers=2, max_tokens=4
        )
    for metric in context.metrics:
        told |= metric
    assert any("good" in name for name in told)


def test_only_settings_of_references_are_held(reward: Model) -> None:
    rules = Principles([Principle("brief", "Be brief.")])
    made = referred({"use": "x", "model": reward, "principles": rules, "judges": [reward, "m"]})
    assert made == {
        "use": "x", "model": hold(reward), "principles": rules.key, "judges": [reward.key, "m"],
    }  # fmt: skip
    inputs = {"a": reward}
    assert referred(inputs) == inputs
    deep = referred([{"use": "judged", "model": {"use": "panel", "judges": [reward]}}])
    assert deep == [{"use": "judged", "model": {"use": "panel", "judges": [reward.key]}}]

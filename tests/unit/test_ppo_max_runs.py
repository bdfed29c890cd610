"""Runs of PPO-max: when the policy begins, what is warned of, and that a resumed run knows both."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch

from truing.context import Context, Json, use
from truing.core.rl.online_task import OnlineTask
from truing.errors import InputError
from truing.method import methods
from truing.models import Model
from truing.tables import Table

PROMPTS = Table("prompt", [{"prompt": f"say {w}"} for w in ("lime", "oak", "rain", "ash")])
LETTERS = {"letters": {"use": "share_of", "letters": "abcdefghijklmnop"}}
SMALL: dict[str, object] = {
    "steps": 4, "batch": 4, "minibatches": 2, "answers": 2, "max_tokens": 6, "lr": 1e-3,
    "rewards": LETTERS,
}  # fmt: skip
WARNING = "ppo_max: warning: rollout"
NEVER = "may go to the critic alone"


@pytest.fixture
def model(tiny_path: Path) -> Model:
    return Model.open(tiny_path)


def run(model: Model, folder: Path, **more: object) -> tuple[Model, list[dict[str, Json]]]:
    with use(Context(seed=4, folder=folder)) as context:
        made = methods["ppo_max"](model, PROMPTS, **{**SMALL, **more})
    assert isinstance(made, Model)
    return made, [m for m in context.metrics if "step" in m]


def alone(steps: list[dict[str, Json]]) -> list[Json]:
    return [m["critic_alone"] for m in steps if "critic_alone" in m]


def test_the_policy_begins_when_the_critics_loss_is_small(
    model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, steps = run(model, tmp_path / "all")  # by default at most ten rollouts, and there are 4
    assert alone(steps) == [1.0] * 4 and NEVER in capsys.readouterr().err
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(made.folded()[name], model.folded()[name])
    _, steps = run(model, tmp_path / "most", critic_rollouts=2)
    assert alone(steps) == [1.0, 1.0, 0.0, 0.0] and NEVER not in capsys.readouterr().err
    made, steps = run(model, tmp_path / "until", critic_rollouts=4, critic_until=100.0)
    assert alone(steps) == [0.0] * 4
    assert not torch.equal(made.folded()[name], model.folded()[name])
    with pytest.raises(InputError, match="setting 'critic_until' must be at least 0"):
        method = methods["ppo_max"]
        method.check(method.validate({"critic_until": -1.0}), {})


def test_a_resumed_run_knows_that_the_policy_has_begun(
    model: Model,
    tmp_path: Path,
    always_save: Callable[[], None],
    interrupted: Callable[[type, int], AbstractContextManager[None]],
) -> None:
    always_save()
    # Ready at the rollout of the smallest share, which is known from a run without the rule.
    settings: dict[str, object] = {"critic_rollouts": 5}
    _, plain = run(model, tmp_path / "plain", **settings, critic_until=0.0)
    shares = [float(str(m["critic_share"])) for m in plain if "critic_share" in m][:3]
    settings["critic_until"] = min(shares) * 1.0001
    expected, whole = run(model, tmp_path / "whole", **settings)
    before = shares.index(min(shares))
    assert alone(whole) == [1.0] * before + [0.0] * (4 - before)
    with interrupted(OnlineTask, 7):  # of eight updates of four rollouts
        run(model, tmp_path / "cut", **settings)
    again, rest = run(model, tmp_path / "cut", **settings)
    assert again.key == expected.key and alone(rest) == alone(whole)


def test_an_alarm_is_told_once(
    model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, steps = run(model, tmp_path / "calm", critic_rollouts=0, lr=1e-6)
    calm = [m for m in steps if "alarm" in m]
    assert not any(m["alarm"] for m in calm) and WARNING not in capsys.readouterr().err
    assert abs(float(str(calm[0]["kl"]))) < 1e-5  # the reference is where it began
    _, steps = run(model, tmp_path / "wild", critic_rollouts=0, lr=5e-2, steps=5, clip=0.0)
    wild = [m for m in steps if "alarm" in m]
    first = next(i for i, m in enumerate(wild) if m["alarm"])
    told = [line for line in capsys.readouterr().err.splitlines() if WARNING in line]
    assert sum(bool(m["alarm"]) for m in wild) > 1 and len(told) == 1
    assert f"rollout {first + 1} looks like collapse" in told[0]
    assert f"KL {float(str(wild[first]['kl'])):.3g} nats a token" in told[0]


def test_the_shape_of_rewards_is_no_reward(model: Model, tmp_path: Path) -> None:
    """`reward` was its name: beside `rewards` and `reward_model` it was taken for one."""
    with pytest.raises(InputError, match="unknown setting 'reward'"):
        run(model, tmp_path, reward="raw")

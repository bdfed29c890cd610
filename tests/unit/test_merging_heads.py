"""Merging what training gave heads: critics are left out and told, score heads refused by a way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from truing.changes import Weights
from truing.context import Context, use
from truing.core.passes.scoring import ScoreHead
from truing.errors import InputError
from truing.method import methods
from truing.models import Model


@pytest.fixture
def critic(tiny_path: Path, tmp_path: Path) -> Model:
    """A policy as PPO leaves it: with the head of its values beside it."""
    model = Model.open(tiny_path)
    name = "model.norm.weight"
    tensors = {
        name: model.folded()[name] + 1,
        "value_head.weight": torch.ones(1, 128),
        "value_head.bias": torch.ones(1),
    }
    (tmp_path / "ppo").mkdir()
    save_file(tensors, tmp_path / "ppo" / "model.safetensors")
    return model.adding(Weights(tmp_path / "ppo")).called("policy")


@pytest.mark.parametrize("name", ["merge/linear", "merge/mixture_of_experts"])
def test_a_critic_is_left_out_and_told(
    name: str, critic: Model, tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = Model.open(tiny_path)
    with use(Context(folder=tmp_path / "step")):
        made = methods[name]({"a": critic, "b": plain})
    assert isinstance(made, Model)
    assert f"{name}: the critic of 'a', which only training goes on from" in capsys.readouterr().err
    assert not made.folded().extra and critic.folded().extra
    found = made.folded()["model.norm.weight"]
    assert torch.allclose(found, plain.folded()["model.norm.weight"] + 0.5)


def test_of_equal_policies_the_critic_goes_too(critic: Model, tmp_path: Path) -> None:
    with use(Context(folder=tmp_path / "step")):
        made = methods["merge/linear"]({"a": critic, "b": critic})
    assert isinstance(made, Model) and not made.folded().extra
    assert torch.equal(made.folded()["model.norm.weight"], critic.folded()["model.norm.weight"])


def test_a_score_head_is_refused_and_the_remedy_works(tiny_path: Path, tmp_path: Path) -> None:
    plain = Model.open(tiny_path)
    reward = ScoreHead(128).added_to(plain, tmp_path / "head")
    with pytest.raises(InputError, match="beyond its architecture") as error:
        methods["merge/linear"]({"a": reward, "b": plain})
    assert "model.export(folder, weights_only=True)" in error.value.fix
    bare = Model.open(reward.export(tmp_path / "bare", weights_only=True))
    with use(Context(folder=tmp_path / "step")):
        made = methods["merge/linear"]({"a": bare, "b": plain})
    assert isinstance(made, Model) and not made.folded().extra


def test_export_of_a_critic_names_the_setting(critic: Model, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot keep the model's head") as error:
        critic.export(tmp_path / "out")
    assert "weights_only=True" in error.value.fix
    assert critic.export(tmp_path / "out", weights_only=True).is_dir()

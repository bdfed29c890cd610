"""All weights trained in float32 behind a module that computes in bfloat16."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from truing.context import Context, use
from truing.core.logprob import measure
from truing.core.passes import precision
from truing.core.passes.master_weights import Masters
from truing.core.tiny import tiny_model
from truing.core.trainer.text_task import TextTask
from truing.core.training import TextTraining
from truing.core.tree import group_tree, pack
from truing.core.weights import open_weights
from truing.errors import InputError
from truing.method import methods
from truing.models import Model, Weights
from truing.tables import Row, Table

ROWS: list[Row] = [
    {"prompt": f"what is {i}?", "chosen": f"it is {i}.", "rejected": f"no {i * 7} idea {i}"}
    for i in range(10)
]
PAIRS, HELD = Table("pair", ROWS[:8]), Table("pair", ROWS[8:])
SMALL: dict[str, object] = {"rank": 0, "steps": 4, "batch": 4, "warmup": 0.0}


@pytest.fixture
def model(tiny_path: Path) -> Model:
    return Model.open(tiny_path)


def trained(
    name: str, folder: Path, model: Model, dtype: str = "bfloat16", **more: object
) -> tuple[Model, Context]:
    with use(Context(seed=4, folder=folder)) as context:
        made = methods[name](model, PAIRS, dtype=dtype, **{**SMALL, **more})
    assert isinstance(made, Model)
    return made, context


def losses(context: Context) -> list[float]:
    return [float(str(m["loss"])) for m in context.metrics if "loss" in m]


def drift(one: Model, two: Model, base: Model) -> float:
    """Norm of the difference of two results as a share of what training changed."""
    a, b, start = one.folded(), two.folded(), base.folded()
    apart = sum(float((a[n] - b[n]).square().sum()) for n in a)
    return (apart / sum(float((a[n] - start[n]).square().sum()) for n in a)) ** 0.5


def test_updates_by_hand() -> None:
    """Two backward passes an update, weights that are tied, and a rate that rounding would lose."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False))
    module[2].weight = module[0].weight  # tied
    w = module[0].weight.detach().clone()
    x = torch.randn(6, 4)
    masters = Masters(module)
    masters.listen()
    (named,) = masters.named_parameters()
    assert named[0] == "0.weight" and named[1].dtype == torch.float32
    ours = torch.optim.AdamW([named[1]], lr=1e-5, weight_decay=0.1)
    hand = nn.Parameter(w.clone())
    theirs = torch.optim.AdamW([hand], lr=1e-5, weight_decay=0.1)
    for _ in range(3):
        ours.zero_grad()
        grads = torch.zeros_like(w)
        for part in (x[:2], x[2:]):
            module(part.bfloat16()).float().square().sum().backward()
            half = hand.detach().bfloat16().requires_grad_()
            y = linear(torch.tanh(linear(part.bfloat16(), half)), half)
            (g,) = torch.autograd.grad(y.float().square().sum(), half)
            grads += g.float()
        assert module[0].weight.grad is None and named[1].grad is not None
        assert torch.equal(named[1].grad, grads)
        ours.step()
        masters.write()
        hand.grad = grads
        theirs.step()
        assert torch.equal(named[1], hand)
        assert torch.equal(module[0].weight, hand.bfloat16())
    assert (hand != w).all() and (hand.bfloat16() == w.bfloat16()).float().mean() > 0.8
    masters.release()
    assert torch.equal(module[0].weight, hand) and module[0].weight is module[2].weight


def test_gradients_of_the_head_add_up_in_float32() -> None:
    """Many chunks of one token each: in bfloat16 later ones would be rounded away."""
    module, _ = tiny_model()
    ids = [3 + i % 50 for i in range(200)]
    packed = pack([group_tree(ids[:2], [ids[2:]])])[0]

    def gradient(chunk: int) -> torch.Tensor:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("truing.core.logprob.CHUNK", chunk)
            module.zero_grad()
            measure(module, packed)["logp"].sum().backward()
        grad = module.get_input_embeddings().weight.grad
        assert grad is not None
        return grad.float()

    module.to(torch.bfloat16)
    whole, parts = gradient(2**23), gradient(259)
    assert float((whole - parts).norm() / whole.norm()) < 5e-3


def test_as_in_float32_but_for_rounding(model: Model, tmp_path: Path) -> None:
    whole, seen = trained("sft", tmp_path / "whole", model, "float32", lr=1e-3)
    half, other = trained("sft", tmp_path / "half", model, lr=1e-3)
    assert losses(other) == pytest.approx(losses(seen), rel=2e-2)
    assert losses(other)[-1] < 0.9 * losses(other)[0]
    assert drift(half, whole, model) < 0.3
    (own,) = (c for c in half.weight_changes if isinstance(c, Weights))
    stored = open_weights(own.path)
    assert all(stored[n].dtype == torch.float32 for n in stored)
    again, _ = trained("sft", tmp_path / "again", model, lr=1e-3)
    assert again.key == half.key


def test_small_updates_are_not_rounded_away(model: Model, tmp_path: Path) -> None:
    """At this rate no update reaches the last bit of a weight in bfloat16; in float32 all count."""
    made, _ = trained("sft", tmp_path, model, lr=1e-6, schedule="constant")
    before, after = model.folded(), made.folded()
    name = "model.layers.0.mlp.up_proj.weight"
    moved = (after[name] - before[name]).abs()
    assert float((moved > 0).float().mean()) > 0.99
    assert float(moved.max()) < 5e-6  # four updates of AdamW


def test_the_reference_is_computed_alike(model: Model, tmp_path: Path) -> None:
    _, context = trained("dpo", tmp_path, model, lr=1e-4)
    assert losses(context)[0] == pytest.approx(math.log(2), abs=5e-3)
    assert losses(context)[-1] < losses(context)[0]


def test_weights_that_are_frozen_stay(model: Model, tmp_path: Path) -> None:
    made, _ = trained("sft", tmp_path, model, lr=1e-3, layers=1)
    (own,) = (c for c in made.weight_changes if isinstance(c, Weights))
    assert {n.split(".")[2] for n in open_weights(own.path)} == {"2"}


@pytest.mark.parametrize("name", ["sft", "tr_dpo"])
def test_killed_and_resumed(
    name: str,
    model: Model,
    tmp_path: Path,
    always_save: Callable[[], None],
    interrupted: Callable[[type, int], AbstractContextManager[None]],
) -> None:
    more: dict[str, object] = {"lr": 1e-3, "held_out": HELD, "eval_every": 1, "keep_best": True}
    more |= {"every": 2} if name == "tr_dpo" else {}
    expected, _ = trained(name, tmp_path / "whole", model, **more)
    always_save()
    with interrupted(TextTask, 3):
        trained(name, tmp_path / "cut", model, **more)
    resumed, _ = trained(name, tmp_path / "cut", model, **more)
    assert resumed.key == expected.key


def test_asked_for_or_probed(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = TextTraining(rank=0)
    monkeypatch.setattr(precision, "probe", lambda *_: (5.0, 1.0))
    assert precision.choose(model, whole, "cpu", full=True) == "bfloat16"
    assert precision.choose(model, whole, "cpu") == "float32"
    monkeypatch.setattr(precision, "probe", lambda *_: (3.0, 1.0))
    assert precision.choose(model, whole, "cpu", full=True) == "float32"
    asked = methods["sft"].validate({"rank": 0, "dtype": "bfloat16"})
    methods["sft"].check(asked, {})
    online = methods["grpo"].validate({"rank": 0, "dtype": "bfloat16"})
    with pytest.raises(InputError, match="setting 'dtype' must be float32"):
        methods["grpo"].check(online, {})

"""Every steering method, found in the registry: strength zero changes no bit, no hook stays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from truing.context import Context, use
from truing.core.generate import generate
from truing.core.logprob import measure
from truing.core.tree import group_tree, pack
from truing.method import methods
from truing.models import Edits, Model
from truing.tables import Row, Table

STEERS = [name for name in methods if name.startswith("steer/")]
ROWS: dict[str, list[Row]] = {
    "pair": [
        {"prompt": f"what is {i}?", "chosen": f"it is {i}.", "rejected": f"no {i * 7} idea"}
        for i in range(6)
    ],
    "unpaired": [
        {"prompt": f"what is {i}?", "completion": f"it is {i}.", "label": i % 2 == 0}
        for i in range(6)
    ],
    "example": [{"prompt": f"what is {i}?", "completion": f"it is {i}."} for i in range(6)],
    "prompt": [{"prompt": f"what is {i}?"} for i in range(6)],
}


def steer(name: str, model: Model, folder: Path, **settings: object) -> Model | None:
    """The method's result on the first kind of rows that it takes; None when it needs more."""
    from truing.errors import InputError

    inputs = [i for i in methods[name].inputs.values() if not i.optional]
    if {i.noun for i in inputs} != {"Model", "Table"} or len(inputs) != 2:
        return None
    for kind, rows in ROWS.items():
        given = {i.name: model if i.noun == "Model" else Table(kind, rows) for i in inputs}
        try:
            with use(Context(seed=1, folder=folder)):
                made = methods[name](**given, **settings)
        except InputError as error:
            if kind == list(ROWS)[-1]:
                raise AssertionError(f"{name} takes no kind of rows") from error
            continue
        assert isinstance(made, Model)
        return made
    return None


def hooks_of(module: nn.Module) -> int:
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + ("forward" in vars(m))
        for m in module.modules()
    )


def logp(model: Model) -> Tensor:
    loaded = model.load_module()
    packed = pack([group_tree([1, 50, 60, 70], [[80, 90, 91], [100]])])[0]
    with loaded.run_time():
        return measure(loaded.module, packed, grad=False)["logp"]


def test_there_are_steering_methods() -> None:
    assert "steer/mean_difference" in STEERS


@pytest.mark.parametrize("name", STEERS)
def test_edits(name: str, tiny_path: Path, tmp_path: Path) -> None:
    model = Model.open(tiny_path)
    before, said = logp(model), generate(model, ["hello"], n=2, max_tokens=6)
    weights = {n: p.clone() for n, p in model.load_module().module.named_parameters()}
    left = hooks_of(model.load_module().module)
    made = steer(name, model, tmp_path / "a")
    if made is None:
        pytest.skip("takes more than a model and a table")
    edits = [c for c in made.run_time_changes if isinstance(c, Edits)]
    assert edits and made.weights_key == model.weights_key
    # It acts, and nothing of it stays behind.
    moved = logp(made)
    generate(made, ["hello"], max_tokens=6)
    assert moved.isfinite().all() and not torch.equal(moved, before)
    assert hooks_of(model.load_module().module) == left
    assert torch.equal(logp(model), before)
    for n, p in model.load_module().module.named_parameters():
        assert torch.equal(p, weights[n]), n
    # Strength zero: the same bits, in measuring and in writing.
    nothing = model
    for change in edits:
        nothing = nothing.adding(Edits(change.path, 0.0))
    assert torch.equal(logp(nothing), before)
    assert generate(nothing, ["hello"], n=2, max_tokens=6) == said
    # The same again is the same model.
    again = steer(name, model, tmp_path / "b")
    assert again is not None and again.key == made.key


@pytest.mark.parametrize("name", STEERS)
def test_the_setting_zero_is_strength_zero(name: str, tiny_path: Path, tmp_path: Path) -> None:
    if "strength" not in methods[name].settings:
        pytest.skip("has no setting called strength")
    model = Model.open(tiny_path)
    made = steer(name, model, tmp_path, strength=0.0)
    if made is None:
        pytest.skip("takes more than a model and a table")
    assert torch.equal(logp(made), logp(model))

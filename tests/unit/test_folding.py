"""What was trained on a base stored in bfloat16 is not rounded away, however it is kept."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from truing.core.modelfiles import lora
from truing.core.tiny import tiny_folder
from truing.core.trainer.train_text import trained_model
from truing.core.weights import Folded, aligned, differences, open_weights
from truing.merge.linear import linear
from truing.models import Adapter, Model, Weights
from truing.tables import Table

NAME = "model.layers.0.mlp.up_proj.weight"
STEP = 2.0**-12  # of a weight: a sixteenth of the bfloat16 step at 1


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The tiny model in bfloat16."""
    folder = tiny_folder(tmp_path_factory.mktemp("short"))
    tensors = {n: t.bfloat16() for n, t in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return Model.open(folder)


def _weight(model: Model, dtype: str = "float32") -> Tensor:
    return model.load_module(dtype, "cpu").module.get_parameter(NAME).detach()


def _adapted(model: Model, folder: Path) -> tuple[Model, Tensor]:
    """The model with an adapter far below a bfloat16 step, and the adapter's product."""
    adapters = lora.attach(model.load_module(fresh=True).module, 4, 8.0)
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for adapter in adapters.adapters.values():
            adapter.b_OR.normal_(0.0, 1e-5, generator=source)
    adapters.save(folder)
    one = adapters.adapters[NAME.removesuffix(".weight")]
    return model.adding(Adapter(folder)), one.scale * (one.b_OR @ one.a_RI).detach()


def _fully(model: Model, folder: Path) -> tuple[Model, Tensor]:
    """The model as a full fine-tune leaves it: all of one weight a little larger."""
    module = model.load_module("float32", "cpu", fresh=True).module
    old = module.get_parameter(NAME)
    step = old.detach() * STEP
    with torch.no_grad():
        old.add_(step)
    data = Table("prompt", [{"id": "0", "prompt": "a"}])
    return trained_model(model, module, None, folder, data, "sft"), step


@pytest.mark.parametrize("way", [_adapted, _fully])
def test_updates_below_a_step_are_kept(way: object, short: Model, tmp_path: Path) -> None:
    made, step = way(short, tmp_path / "change")  # type: ignore[operator]
    base = open_weights(short.folder)[NAME]
    wanted = base.float() + step
    vanishing = (wanted.bfloat16() == base) & (wanted != base.float())
    assert vanishing.float().mean() > 0.9
    assert torch.allclose(_weight(made), wanted, rtol=0, atol=1e-9)
    # In bfloat16 an adapter stands beside the weights, which stay as they are.
    kept = base if way is _adapted else wanted.bfloat16()
    assert torch.equal(_weight(made, "bfloat16"), kept)
    made.save(tmp_path / "saved")
    assert torch.allclose(_weight(Model.load(tmp_path / "saved")), wanted, rtol=0, atol=1e-9)
    # What is touched alone is read in another type; a plain folder keeps its own.
    assert {t.dtype for t in made.folded().values()} == {torch.bfloat16}
    made.export(tmp_path / "plain")
    assert open_weights(tmp_path / "plain")[NAME].dtype == torch.bfloat16


def test_a_full_fine_tune_says_float32_and_stores_no_more(short: Model, tmp_path: Path) -> None:
    _fully(short, tmp_path / "change")
    stored = open_weights(tmp_path / "change")
    assert list(stored) == [NAME] and stored[NAME].dtype == torch.float32


def test_export_rounds_once(short: Model, tmp_path: Path) -> None:
    """Two updates of 0.4 of a step each are one step together, and none one by one."""
    base = open_weights(short.folder)[NAME]
    spacing = torch.full_like(base, 2.0**-9).float()
    part = {NAME: 0.4 * spacing}
    made = short
    whole = {NAME: torch.full_like(base, 0.25)}
    save_file(whole, tmp_path / "whole.safetensors")
    save_file(part, tmp_path / "part.safetensors")
    made = made.adding(Weights(tmp_path / "whole.safetensors"))
    for _ in range(2):
        made = made.adding(Weights(tmp_path / "part.safetensors", delta=True))
    made.export(tmp_path / "out")
    wanted = (0.25 + 0.8 * spacing).bfloat16()
    assert torch.equal(open_weights(tmp_path / "out")[NAME], wanted)
    assert not torch.equal(wanted, whole[NAME])


def test_merging_keeps_what_was_trained(short: Model, tmp_path: Path) -> None:
    made, step = _fully(short, tmp_path / "change")
    base = open_weights(short.folder)[NAME].float()
    merged = linear({"a": made, "b": short})
    assert torch.allclose(_weight(merged), base + step / 2, rtol=0, atol=1e-8)
    walked = dict(aligned({"a": made.folded(), "b": short.folded()}))
    assert {t.dtype for t in walked[NAME].values()} == {torch.float32}
    others: Iterator[Tensor] = (t for n, r in walked.items() if n != NAME for t in r.values())
    assert {t.dtype for t in others} == {torch.bfloat16}


def test_differences_are_exact(tmp_path: Path) -> None:
    save_file({"w": torch.ones(4, dtype=torch.bfloat16)}, tmp_path / "b.safetensors")
    base = open_weights(tmp_path / "b.safetensors")
    new = torch.ones(4) + STEP
    (found,) = differences(base, [("w", new)])
    assert found[1] is new
    assert not list(differences(base, [("w", torch.ones(4))]))
    assert not list(differences(base, [("w", torch.ones(4, dtype=torch.bfloat16))]))


def test_wide_bases_stay_wide(tmp_path: Path) -> None:
    third = torch.full((4,), 1 / 3, dtype=torch.float64)
    save_file({"w": third}, tmp_path / "b.safetensors")
    save_file({"w": torch.ones(4)}, tmp_path / "d.safetensors")
    change = Weights(tmp_path / "d.safetensors", delta=True)
    folded = Folded(open_weights(tmp_path / "b.safetensors"), [change])
    assert torch.equal(folded["w"], third + 1) and torch.equal(folded.unrounded("w"), third + 1)

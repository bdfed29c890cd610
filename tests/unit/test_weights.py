"""Lazy weights: shards, tied tensors, several models in parallel, nothing stored twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from truing.core.modelfiles.weight_files import INDEX
from truing.core.tiny import tiny_folder
from truing.core.weights import Folded, aligned, open_weights, patched, replaced, write
from truing.errors import InputError
from truing.models import Model, Weights


def _tensors(n: int = 5) -> dict[str, torch.Tensor]:
    return {f"layer.{i}.weight": torch.full((10, 10), float(i)) for i in range(n)}


def test_shards_round_trip(tmp_path: Path) -> None:
    tensors = _tensors()
    write(tmp_path, tensors.items(), shard_bytes=900)  # two of 400 bytes fit
    names = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert names == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 2000
    back = open_weights(tmp_path)
    assert set(back) == set(tensors) and back.shape("layer.3.weight") == (10, 10)
    assert all(torch.equal(back[n], t) for n, t in tensors.items())
    assert not list(tmp_path.glob("*.partial"))


def test_writing_holds_one_shard_at_a_time(tmp_path: Path) -> None:
    alive: list[int] = []

    def stream():
        for i in range(6):
            files = len(list(tmp_path.glob("*.partial")))
            alive.append(i - 2 * files)
            yield f"t{i}", torch.zeros(10, 10)

    write(tmp_path, stream(), shard_bytes=800)
    assert max(alive) <= 2


def test_missing_shard_is_named(tmp_path: Path) -> None:
    write(tmp_path, _tensors().items(), shard_bytes=900)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(InputError, match="model-00002-of-00003"):
        open_weights(tmp_path)


@pytest.mark.parametrize("place", ["../other", "weights"])
def test_shards_lie_beside_their_index(tmp_path: Path, place: str) -> None:
    """Elsewhere, keys of models and copies of them would not have them."""
    folder, shards = tmp_path / "model", tmp_path / "model" / place
    folder.mkdir()
    shards.mkdir()
    write(shards, _tensors().items(), shard_bytes=900)
    index = json.loads((shards / INDEX).read_text())
    index["weight_map"] = {n: f"{place}/{file}" for n, file in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(InputError, match=rf"missing.*{place}/model-00001.*in one folder"):
        open_weights(folder)


def test_pickled_weights_are_not_opened(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="no weights in safetensors"):
        open_weights(tmp_path)


def test_stored_copy_of_tied_weights_is_hidden(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "lm_head.weight" not in open_weights(folder)
    module = Model.open(folder).load_module().module
    assert module.lm_head.weight is module.model.embed_tokens.weight
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    assert "lm_head.weight" in open_weights(folder)


def test_names_of_a_bare_backbone_match(tmp_path: Path) -> None:
    save_file({"layer.0.weight": torch.zeros(2)}, tmp_path / "b.safetensors")
    save_file({"transformer.layer.0.weight": torch.ones(2)}, tmp_path / "d.safetensors")
    change = Weights(tmp_path / "d.safetensors", delta=True)
    folded = Folded(open_weights(tmp_path / "b.safetensors"), [change])
    assert folded["layer.0.weight"].tolist() == [1.0, 1.0] and folded.changed == {"layer.0.weight"}


def test_folding_keeps_dtype(tmp_path: Path) -> None:
    save_file({"w": torch.full((4,), 2.0, dtype=torch.bfloat16)}, tmp_path / "b.safetensors")
    save_file({"w": torch.full((4,), 0.25)}, tmp_path / "d.safetensors")
    change = Weights(tmp_path / "d.safetensors", delta=True)
    w = Folded(open_weights(tmp_path / "b.safetensors"), [change])["w"]
    assert w.dtype == torch.bfloat16 and w.tolist() == [2.25] * 4


def test_aligned_refuses_before_reading(tmp_path: Path) -> None:
    for i, width in enumerate((4, 5)):
        (tmp_path / str(i)).mkdir()
        save_file({"embed": torch.zeros(width, 2)}, tmp_path / str(i) / "model.safetensors")
    pair = {str(i): Folded(open_weights(tmp_path / str(i)), []) for i in (0, 1)}
    with pytest.raises(InputError, match=r"shape of 'embed'.*\(4, 2\) and \(5, 2\)"):
        next(aligned(pair, where="merge/linear"))


def test_replaced_stores_only_what_differs(tmp_path: Path) -> None:
    model = Model.open(tiny_folder(tmp_path / "m"))
    folded = model.folded()
    name = "model.layers.0.mlp.up_proj.weight"
    new = replaced(
        model, ((n, folded[n] + 1 if n == name else folded[n]) for n in folded), tmp_path / "c"
    )
    assert list(open_weights(tmp_path / "c")) == [name]
    assert torch.equal(new.folded()[name], folded[name] + 1)
    same = replaced(model, ((n, folded[n]) for n in folded), tmp_path / "none")
    assert same.key == model.key and same.changes == ()


def test_patched_writes_entries_exactly(tmp_path: Path) -> None:
    model = Model.open(tiny_folder(tmp_path / "m"))
    name = "model.layers.0.mlp.up_proj.weight"
    places, values = torch.tensor([3, 200]), torch.tensor([0.1, -7.5])
    new = patched(model, {name: (places, values)}, tmp_path / "p")
    before, after = model.folded()[name].flatten(), new.folded()[name].flatten()
    assert torch.equal(after[places], values)
    assert int((before != after).sum()) == 2
    assert patched(model, {name: (places[:0], values[:0])}, tmp_path / "q") is model

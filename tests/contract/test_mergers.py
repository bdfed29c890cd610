"""Every merge method, found in the registry: equal inputs come back, dtype, ties, tokens stay."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from truing.context import Context, use
from truing.core.tiny import tiny_folder
from truing.method import methods
from truing.models import Model

MERGERS = [name for name in methods if name.startswith("merge/")]
# What may go beyond the models that it merges, and why.
BEYOND = {
    "merge/dare_linear": "what is not dropped is rescaled",
    "merge/dare_ties": "what is not dropped is rescaled",
    "merge/slerp": "an arc between two tensors leaves the box that they span",
}


def _inputs(name: str, model: Model, other: Model | None = None) -> dict[str, object]:
    """A model for each input: roles get two, of which `other` may be the second."""
    found: dict[str, object] = {}
    for i in methods[name].inputs.values():
        if i.noun == "Model" and not i.optional:
            found[i.name] = {"a": model, "b": other or model} if i.many else model
    return found


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Model]:
    """Two bfloat16 models, the second with noise on it."""
    root = tmp_path_factory.mktemp("pair")
    first = tiny_folder(root / "first")
    second = shutil.copytree(first, root / "second")
    tensors = load_file(first / "model.safetensors")
    source = torch.Generator().manual_seed(0)
    for folder, noise in ((first, 0.0), (second, 0.05)):
        low = {
            n: (t + noise * torch.randn(t.shape, generator=source)).to(torch.bfloat16)
            for n, t in tensors.items()
        }
        save_file(low, folder / "model.safetensors", metadata={"format": "pt"})
    return Model.open(first), Model.open(second)


def test_there_are_mergers() -> None:
    assert {"merge/linear", "merge/ties"} <= set(MERGERS)


@pytest.mark.parametrize("name", MERGERS)
def test_equal_inputs_come_back(name: str, pair: tuple[Model, Model]) -> None:
    merged = methods[name](**_inputs(name, pair[0]))
    assert isinstance(merged, Model)
    before, after = pair[0].folded(), merged.folded()
    if set(before) == set(after):
        assert all(torch.equal(after[n], before[n]) for n in before)
        return
    # Another architecture: it computes what they computed.
    ids = torch.tensor([[1, 7, 99, 200, 13, 5, 5, 2]])
    with torch.no_grad():
        a, b = (m.load_module().module(ids).logits for m in (pair[0], merged))
    assert torch.allclose(a, b, atol=1e-4 * float(a.abs().max()))


@pytest.mark.parametrize("name", MERGERS)
def test_dtype_ties_and_tokens_stay(name: str, pair: tuple[Model, Model], tmp_path: Path) -> None:
    merged = methods[name](**_inputs(name, *pair))
    assert isinstance(merged, Model)
    assert merged.weights_key != pair[0].weights_key
    folded = merged.folded()
    assert {t.dtype for t in folded.values()} == {torch.bfloat16}
    same = merged.base.config["architectures"] == pair[0].base.config["architectures"]
    assert (set(folded) == set(pair[0].folded())) is same
    assert all(torch.isfinite(t).all() for t in folded.values())
    loaded = merged.load_module()
    assert loaded.module.lm_head.weight is loaded.module.model.embed_tokens.weight
    merged.export(tmp_path / "out")
    for file in ("tokenizer.json", "chat_template.jinja"):
        source = pair[0].folder / file
        assert (tmp_path / "out" / file).read_bytes() == source.read_bytes()


@pytest.mark.parametrize("name", MERGERS)
def test_same_call_gives_same_bits(name: str, pair: tuple[Model, Model], tmp_path: Path) -> None:
    keys: list[str] = []
    for run in ("one", "two"):  # in folders of their own, so that nothing is found ready
        with use(Context(folder=tmp_path / run)):
            merged = methods[name](**_inputs(name, *pair))
        assert isinstance(merged, Model)
        keys.append(merged.key)
    assert keys[0] == keys[1]


@pytest.fixture(scope="module")
def own_head(pair: tuple[Model, Model], tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The first of the pair, with an output head of its own."""
    folder = shutil.copytree(pair[0].folder, tmp_path_factory.mktemp("head") / "own")
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    head = torch.randn(259, 128, generator=torch.Generator().manual_seed(1))
    tensors["lm_head.weight"] = head.to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return Model.open(folder)


@pytest.mark.parametrize("tied_first", [True, False])
@pytest.mark.parametrize("name", MERGERS)
def test_a_tied_head_is_combined_with_one_of_its_own(
    name: str, tied_first: bool, pair: tuple[Model, Model], own_head: Model, tmp_path: Path
) -> None:
    models = (pair[0], own_head) if tied_first else (own_head, pair[0])
    merged = methods[name](**_inputs(name, *models))
    assert isinstance(merged, Model)
    embed = load_file(pair[0].folder / "model.safetensors")["model.embed_tokens.weight"]
    own = load_file(own_head.folder / "model.safetensors")["lm_head.weight"]
    module = merged.load_module().module
    made = module.lm_head.weight
    assert not module.config.tie_word_embeddings
    assert torch.equal(module.model.embed_tokens.weight, embed.float())  # both have the same
    # The tied head counts as a copy of the embeddings: the result lies between the two.
    low, high = torch.minimum(embed, own).float(), torch.maximum(embed, own).float()
    inside = bool(((low - 0.01 <= made) & (made <= high + 0.01)).all())
    assert inside or name in BEYOND
    assert not torch.allclose(made, embed.float() if tied_first else own.float(), atol=0.1)
    if name == "merge/linear":
        assert torch.allclose(made, (embed.float() + own.float()) / 2, atol=0.01)
    plain = Model.open(merged.export(tmp_path / "plain"))
    assert torch.equal(plain.load_module().module.lm_head.weight, made)

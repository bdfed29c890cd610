"""Models of one tokenizer whose embeddings are padded to different sizes train with each other."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from truing.context import Context, use
from truing.core.generation.model_mixture import Alongside
from truing.core.sampling import Row
from truing.core.trainer.teacher import whole_vocabulary
from truing.core.tree import group_tree, pack
from truing.method import methods
from truing.models import Model
from truing.tables import Table

MORE = 13  # outputs that no token has
WORDS = ("sun", "moon")


@pytest.fixture(scope="module")
def padded(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights with likelier outputs behind the last token."""
    folder = tmp_path_factory.mktemp("padded") / "model"
    shutil.copytree(tiny_path, folder)
    config = json.loads((folder / "config.json").read_text())
    config["vocab_size"] += MORE
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    (name,) = [n for n in tensors if n.endswith("embed_tokens.weight")]
    source = torch.Generator().manual_seed(1)
    more = 0.3 * torch.randn(MORE, tensors[name].shape[1], generator=source)
    tensors[name] = torch.cat([tensors[name], more])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def run(name: str, model: Path, reference: Path, folder: Path, **more: object) -> list[float]:
    """Losses of a short run."""
    online = name in ("xpo", "nash_md", "grpo_top_kl")
    rows = [{"prompt": f"say {w}", "chosen": f"the {w}", "rejected": "no"} for w in WORDS]
    if online:
        rows = [{"prompt": row["prompt"]} for row in rows]
    with use(Context(folder=folder, seed=5)) as context:
        methods[name](
            Model.open(model),
            Table("prompt" if online else "pair", rows),
            reference=Model.open(reference),
            batch=2,
            **more,
        )
    return [cast(float, m["loss"]) for m in context.metrics if "step" in m]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("name", ["tdpo1", "tdpo2"])
def test_objectives_compare_with_a_reference_of_other_padding(
    name: str, turned: bool, tiny_path: Path, padded: Path, tmp_path: Path
) -> None:
    model, reference = (padded, tiny_path) if turned else (tiny_path, padded)
    losses = run(name, model, reference, tmp_path, steps=1)
    assert len(losses) == 1 and math.isfinite(losses[0])


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("name", ["xpo", "nash_md", "grpo_top_kl"])
def test_online_methods_train_and_draw_no_padding(
    name: str, turned: bool, tiny_path: Path, padded: Path, tmp_path: Path
) -> None:
    model, reference = (padded, tiny_path) if turned else (tiny_path, padded)
    rule = {"letters": {"use": "share_of", "letters": "abcdefghijklmnop"}}
    losses = run(name, model, reference, tmp_path, steps=1, answers=2, max_tokens=8, rewards=rule)
    assert len(losses) == 1 and math.isfinite(losses[0])
    lines = [x for p in tmp_path.rglob("rollouts-*/*.jsonl") for x in p.read_text().splitlines()]
    noted = [json.loads(line) for line in lines]
    groups = [group for key, value in noted if not key.endswith("reward") for group in value]
    drawn = [token for group in groups for answer in group for token in answer[0]]
    assert drawn and max(drawn) < 259


def test_the_vocabulary_of_a_reference_is_the_models(tiny_path: Path, padded: Path) -> None:
    small, large = (Model.open(p).load_module().module for p in (tiny_path, padded))
    (packed,) = pack([group_tree([3, 4, 5], [[6, 7, 8], [9, 10]])])
    plain = whole_vocabulary(small, packed, 259)(slice(None))
    cut = whole_vocabulary(large, packed, 259)(slice(None))
    assert cut.shape == (5, 259) and torch.allclose(cut, plain, atol=1e-5)
    wide = whole_vocabulary(small, packed, 259 + MORE)(slice(None))
    assert torch.equal(wide[:, :259], plain)
    assert torch.all(wide[:, 259:].exp() == 0) and bool(wide.isfinite().all())


def test_a_mixture_draws_what_both_have(tiny_path: Path, padded: Path) -> None:
    small, large = (Model.open(p).load_module().module for p in (tiny_path, padded))
    ids = [3, 4, 5]

    def logits(module: nn.Module) -> Tensor:
        with torch.no_grad():
            return cast(Tensor, module(torch.tensor([ids])).logits[:, -1].float())

    def mixed(first: nn.Module, second: nn.Module) -> Tensor:
        from contextlib import nullcontext

        hook = Alongside(second, nullcontext, 0.25, 4)
        with torch.no_grad():
            return hook([Row(0, 0, ids, [])], logits(first))

    assert torch.allclose(mixed(small, large), logits(small), atol=1e-4)
    turned = mixed(large, small)
    assert torch.allclose(turned[:, :259], logits(small), atol=1e-4)
    assert torch.all(turned.softmax(1)[:, 259:] == 0)

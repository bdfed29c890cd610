"""Models with windows of attention on trees against their padded rows, in value and gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from truing.core.logprob import measure
from truing.core.tree import Node, pack

WINDOW = 8
SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "initializer_range": 0.15,
}  # fmt: skip
KINDS = ["sliding_attention", "full_attention", "sliding_attention"]


def gemma() -> PreTrainedModel:
    config = Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=WINDOW, layer_types=KINDS)
    return Gemma3ForCausalLM(config)


def mistral() -> PreTrainedModel:
    return MistralForCausalLM(MistralConfig(**SIZES, head_dim=8, sliding_window=WINDOW))


def qwen() -> PreTrainedModel:
    own = {"sliding_window": WINDOW, "use_sliding_window": True, "layer_types": KINDS}
    return Qwen2ForCausalLM(Qwen2Config(**SIZES, **own))


def node(start: int, size: int, loss: bool, *children: Node) -> Node:
    ids = tuple((start + 7 * i) % 61 for i in range(size))
    return Node(ids, (loss,) * size, children)


TREES = [
    node(1, 13, False, node(2, 9, True), node(3, 4, True, node(4, 12, True), node(5, 1, True))),
    node(6, 3, False, node(7, 2, True)),  # shorter than the window
]


def weighed(logp: Tensor) -> Tensor:
    return (logp * torch.linspace(0.5, 1.5, len(logp))).sum()


@pytest.mark.parametrize("make", [gemma, mistral, qwen])
def test_values_and_gradients_are_those_of_padded_rows(
    make: Callable[[], PreTrainedModel],
) -> None:
    torch.manual_seed(0)
    module = make().eval()
    (packed,) = pack(TREES, 10**6)
    made = measure(module, packed)["logp"]
    rows = [made[u, k][packed.mask_UKT[u, k] > 0] for u, k in ((0, 0), (0, 1), (0, 2), (1, 0))]
    grads = torch.autograd.grad(sum(map(weighed, rows)), list(module.parameters()))
    plain: list[Tensor] = []
    for ids, loss in (row for tree in TREES for row in tree.rows()):
        logits = module(torch.tensor([ids]), use_cache=False).logits[0, :-1]
        logp = logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        plain.append(logp[torch.tensor(loss[1:])])
    for a, b in zip(rows, plain, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    wanted = torch.autograd.grad(sum(map(weighed, plain)), list(module.parameters()))
    for a, b in zip(grads, wanted, strict=True):
        assert float((a - b).abs().max()) <= 1e-5 * max(1.0, float(b.abs().max()))
    # A window that reached further would give other values.
    module.config.sliding_window = 64
    for part in module.modules():
        if getattr(part, "sliding_window", None):
            part.sliding_window = 64
    wider = measure(module, packed, grad=False)["logp"]
    assert float((wider - made.detach()).abs().max()) > 1e-4

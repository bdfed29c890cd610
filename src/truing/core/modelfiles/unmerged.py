"""Adapters beside weights of half precision: y = x W^T + s (x A^T) B^T, the last term in float32.

So they stand beside those of 4 bits, too (`nf4`), in whatever type these are computed in.

Weights of bfloat16 have steps of 1/256 of their size: folded into them, what an adapter has learnt
is rounded to those, and what is less than half of one is gone. So a model that is drawn from,
compared with or trained further in half precision stands there as it did while it was trained: the
weights in their files' type, adapters beside them, and a new one beside those
(`core.modelfiles.lora`).

Shapes: I input and O output features, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from truing.changes import Adapter
from truing.core.modelfiles import lora
from truing.core.modelfiles.patches import ADAPTER, AdapterPatch, stacked
from truing.core.weights import open_weights, same_name

if TYPE_CHECKING:
    from truing.models import Model


def adapters_of(model: Model) -> list[Adapter]:
    """Stored adapters that may stand beside a model's weights, in their order.

    [] where weights are put in the place of others after an adapter was folded in.
    """
    found: list[Adapter] = []
    base = set(open_weights(model.folder))
    for change in model.weight_changes:
        if isinstance(change, Adapter):
            found.append(change)
        elif found and any(
            same_name(n.removesuffix(".at").removesuffix(".to"), base)
            for n in open_weights(change.path)
        ):
            return []
    return found


def put(module: nn.Module, adapters: Sequence[Adapter]) -> bool:
    """Put stored adapters on a module's linear layers, in their order; they are not to be trained.

    Returns False, with nothing put, where one belongs on something else, such as an embedding, a
    head or several experts in one tensor, brings whole tensors, would be merged, or does not fit.
    """
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for change in adapters:
        patch = AdapterPatch(change.path, open_weights(change.path / ADAPTER))
        if patch.whole:
            return False
        for name, parts in patch.modules.items():
            linear = _linear(module, name)
            if linear is None or lora.merges(linear) or set(parts) != {"A", "B"}:
                return False
            a_RI, b_OR = patch.pair(name)
            if (b_OR.shape[0], a_RI.shape[1]) != lora.sides(linear):
                return False
            found.setdefault(name, []).append((a_RI, b_OR))
    made: dict[str, lora.Adapter] = {}
    for name, pairs in found.items():
        a_RI, b_OR = stacked(pairs)
        made[name] = one = lora.Adapter(module.get_submodule(name), len(a_RI), 1.0)
        with torch.no_grad():
            one.a_RI.requires_grad_(False).copy_(a_RI)
            one.b_OR.requires_grad_(False).copy_(b_OR)
    lora.Lora(module, made, 1, 1.0)
    return True


def stand(model: Model, module: nn.Module) -> bool:
    """Whether all stored adapters that may stand beside the weights do so in this module."""
    return not adapters_of(model) or any(lora.adapter_of(m, always=True) for m in module.modules())


def _linear(module: nn.Module, name: str) -> nn.Module | None:
    """The linear layer of that name; None where it is none, or the head, which is read directly."""
    from transformers.pytorch_utils import Conv1D

    try:
        found = module.get_submodule(name)
    except AttributeError:
        return None
    head = getattr(module, "get_output_embeddings", lambda: None)()
    return found if isinstance(found, (nn.Linear, Conv1D)) and found is not head else None

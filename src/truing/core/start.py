"""How the training of a language model begins, whatever it learns from.

The module and its dtype, how many tokens fit, the check of template and masks, what is said before
anything is trained, a forecast of the memory, and the frozen model that it is compared with.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch

from truing.context import Json, current
from truing.core import distributed
from truing.core.chat import check_receipt, receipt
from truing.core.opening import same_tokens
from truing.core.tree import BUDGET
from truing.doctor import memory_gib
from truing.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from truing.core.training import TextTraining
    from truing.core.tree import Node
    from truing.models import Loaded, Model

GPU_BUDGET = 16384
BYTES_PER_TOKEN = 24  # of activations, times hidden size and layers, that one training token holds


@dataclass(frozen=True)
class Start:
    """A model in memory that is about to be trained.

    Args:
        where: name of the method, which errors name.
        model: as it was given.
        reference: the frozen model that was given, if any.
        settings: how it will be trained.
        loaded: a module of its own.
        dtype: that modules compute in.
        limit: tokens of prompt and answer together.
        budget: tokens of a micro-batch.
    """

    where: str
    model: Model
    reference: Model | None
    settings: TextTraining
    loaded: Loaded
    dtype: str
    limit: int
    budget: int

    def check(
        self,
        trees: Sequence[Node],
        largest: int,
        notes: Mapping[str, Json],
        *,
        ended: bool = False,
        shown: int = 0,
    ) -> None:
        """Check masks, template and memory, and say what will be trained.

        Args:
            trees: that carry loss, or that stand for those to come.
            largest: tokens of the largest tree.
            notes: said and recorded, beside how it is computed.
            ended: True where no answer needs an end.
            shown: trees of which the loss tokens are shown.
        Raises:
            InputError: see `check_receipt` and `check_memory`.
        """
        module, tokenizer = self.loaded.module, self.loaded.tokenizer
        embedding = cast("nn.Embedding", cast("object", module.get_input_embeddings()))  # type: ignore[operator]
        stops = getattr(getattr(module, "generation_config", None), "eos_token_id", None)
        check_receipt(
            tokenizer,
            trees,
            vocab=embedding.num_embeddings,
            stops=[stops] if isinstance(stops, int) else list(stops or []),
            ended=ended,
            where=self.where,
        )
        if distributed.leads():
            facts = dict(notes) | {
                "device": self.loaded.device,
                "dtype": self.dtype,
                "budget": self.budget,
                "threads": torch.get_num_threads(),
            }
            print(
                f"{self.where}: " + ", ".join(f"{n}: {v}" for n, v in facts.items()),
                file=sys.stderr,
            )
            if shown:
                facts["receipt"] = text = receipt(tokenizer, trees, shown)
                print(f"loss falls on >>>these tokens<<<:\n{text}", file=sys.stderr)
            current().metric(**facts)
        check_memory(module, self.settings, largest, self.where)

    def frozen(self) -> Loaded:
        """The reference in memory: the one given, or the model itself."""
        return (self.reference or self.model).load_module(self.dtype)


def begin(
    model: Model, settings: TextTraining, where: str, *, reference: Model | None = None
) -> Start:
    """Read a model into memory to train it.

    Args:
        reference: frozen, and of the same tokens; None where there is none, or the model itself.
    Raises:
        InputError: a reference with another tokenizer or template.
    """
    if reference is not None:
        same_tokens({"model": model, "reference": reference}, where=where)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # A full fine-tune keeps its weights in float32, where small updates are not rounded away.
    short = device == "cuda" and settings.rank > 0 and torch.cuda.is_bf16_supported()
    dtype = "bfloat16" if short else "float32"
    loaded = model.load_module(dtype, device, fresh=True)
    limit = room(loaded, settings.max_tokens)
    budget = settings.budget or (GPU_BUDGET if device == "cuda" else BUDGET)
    return Start(where, model, reference, settings, loaded, dtype, limit, budget)


def room(loaded: Loaded, wanted: int) -> int:
    """Tokens of a row: those wanted, or the model's context where that is less."""
    context = getattr(loaded.module.config, "max_position_embeddings", None)
    return min(wanted, int(context or wanted))


def check_memory(module: nn.Module, settings: TextTraining, largest: int, where: str) -> None:
    """Raise before a run that this machine's memory could not hold."""
    _, free = memory_gib()
    if not free or next(module.parameters()).is_cuda:
        return
    config = module.config
    hidden = int(getattr(config, "hidden_size", 0))
    layers = int(getattr(config, "num_hidden_layers", 0))
    size = sum(p.numel() * p.element_size() for p in module.parameters())
    if 0 < settings.layers < layers:  # the blocks below keep neither gradients nor activations
        size, layers = size * settings.layers // layers, settings.layers
    # A full fine-tune holds gradients and two moments; an adapter a merged copy of the weights.
    state = (1 if settings.rank else 3) * size
    activations = max(largest, settings.budget or BUDGET) * hidden * layers * BYTES_PER_TOKEN * 4
    needed = (state + activations) / 2**30
    if needed > 0.95 * free:
        raise InputError(
            f"training needs about {needed:.1f} GiB more and {free:.1f} GiB of memory are free",
            where=where,
            fix="Lower max_tokens or budget" + ("" if settings.rank else ", or train an adapter"),
        )

"""A forecast of what training holds beside the weights, and what is done about it.

    needed = state + copies + head + tokens * (activations + masks)

A trunk that is trained beside the module (a critic's) holds as much again, and its weights. Copies
of weights that are loaded later, such as a frozen reference's, count too (`Beside`).

state: gradients and two moments of what is trained, and merged weights under an adapter.
head: logits of one chunk and what is made of them. masks: of nodes that see others, which a GPU is
given whole; on a CPU they are small beside the rest. activations: a token's, measured on a small
tree by counting what a forward pass leaves for the backward one, of L blocks and of two more for
what the backward pass itself makes; with the blocks' inputs alone kept (`recompute`), L inputs and
three blocks. Rows that are measured only, held-out ones, leave nothing for a backward pass: two
blocks.

A run that does not fit takes smaller micro-batches, where their size is the machine's to choose,
and gradient checkpointing after that: it costs a second forward pass, a smaller micro-batch next to
nothing.

Shapes: N tokens, D hidden size, L blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from truing.core.logprob import CHUNK, chunk_of, small_tree, states
from truing.core.modelfiles import lora
from truing.core.modelfiles.nf4 import packed_in
from truing.core.modelfiles.reach import text_config
from truing.core.trainer import distributed
from truing.core.trunk import blocks_of

if TYPE_CHECKING:
    from truing.core.training import TextTraining

# Of the free memory that a run may take: what is held was up to 13 % more than is forecast.
SHARE = 0.85
FLOAT = 4  # bytes of a number in float32
LOGITS = 4  # tensors of a chunk's logits at a time
SPARE, SPARE_AGAIN = 2, 3  # blocks' activations beyond those kept


@dataclass(frozen=True)
class Beside:
    """What training will load beside the module, which is in memory already.

    Args:
        trunks: trained as the module is, each with weights of its own.
        frozen: copies of all weights.
        moving: copies of what is trained.
        cut: whether weights that are all trained are cut over the processes then.
    """

    trunks: int = 0
    frozen: int = 0
    moving: int = 0
    cut: bool = False


@dataclass(frozen=True)
class Forecast:
    """Bytes that training will hold beside the module's weights.

    Args:
        state: of what is trained, whatever the micro-batch.
        inside: of one token, activations of one block.
        input: of one token, what goes into a block.
        logits: of one token.
        blocks: that gradients flow through, of all trunks.
        copies: of weights that are loaded beside the module.
        masks: of one token, on a GPU: once for all blocks.
        chunk: logits of a chunk.
    """

    state: int
    inside: float
    input: int
    logits: int
    blocks: int
    copies: int = 0
    masks: int = 0
    chunk: int = CHUNK

    def needed(self, tokens: int, recompute: bool) -> float:
        """With micro-batches of so many tokens, with or without gradient checkpointing."""
        if recompute:
            token = self.blocks * self.input + SPARE_AGAIN * self.inside
        else:
            token = (self.blocks + SPARE) * self.inside
        return self._of(tokens, token)

    def measured(self, tokens: int) -> float:
        """With so many tokens at once that no gradients flow through."""
        return self._of(tokens, SPARE * self.inside)

    def _of(self, tokens: int, token: float) -> float:
        head = LOGITS * min(tokens * self.logits, self.chunk * FLOAT)
        return self.state + self.copies + head + tokens * (token + self.masks)

    def too_much(self, needed: float, free: float) -> tuple[str, float]:
        """Which share must become smaller where this does not fit into `free`, and its bytes.

        Shorter rows help where all else fits.
        """
        if self.state + self.copies <= SHARE * free:
            return "rows", needed - self.state - self.copies
        return ("trained", self.state) if self.state >= self.copies else ("copies", self.copies)


@dataclass(frozen=True)
class Choice:
    """How a run is computed so that it fits: tokens of a micro-batch, gradient checkpointing."""

    budget: int
    recompute: bool


def embedding_of(module: nn.Module) -> Tensor:
    """Weight [vocabulary, D] of the input embeddings."""
    return cast("Callable[[], nn.Embedding]", module.get_input_embeddings)().weight


def _trained_blocks(module: nn.Module, settings: TextTraining) -> list[nn.Module]:
    blocks = list(blocks_of(module))
    return blocks[-settings.layers :] if settings.layers else blocks


def _linears(module: nn.Module, settings: TextTraining) -> list[nn.Module]:
    """The layers that adapters go on."""
    return list(lora.linears_of(module, settings.targets, settings.layers).values())


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of all of them, those that are there twice counted once."""
    return sum(t.nbytes for t in {id(t): t for t in tensors}.values())


def _trained(module: nn.Module, settings: TextTraining, cut: bool) -> int:
    """Bytes of what is trained that this process holds: its shard, where weights are cut."""
    if settings.rank:
        sides = sum(sum(lora.sides(layer)) for layer in _linears(module, settings))
        return FLOAT * settings.rank * sides
    parts = _trained_blocks(module, settings) if settings.layers else [module]
    every = {id(p): p.numel() for part in parts for p in part.parameters()}
    # In float32, whatever they are rounded to where they are computed with.
    return FLOAT * sum(every.values()) // (distributed.now().size if cut else 1)


def _state(module: nn.Module, settings: TextTraining, cut: bool) -> int:
    trained = _trained(module, settings, cut)
    if not settings.rank:  # gradients and two moments
        # The head's gradient is made whole, and apart.
        return 3 * trained + (0 if settings.layers else FLOAT * embedding_of(module).numel())
    merged = [layer for layer in _linears(module, settings) if lora.merges(layer)]
    made = FLOAT * sum(math.prod(lora.sides(layer)) for layer in merged)
    # Weights of 4 bits are unpacked one at a time.
    made += FLOAT * max((math.prod(lora.sides(p)) for p in packed_in(module)), default=0)
    return 4 * trained + made  # with the adapter's own values


def mask_bytes(module: nn.Module, row: int) -> int:
    """Of one token on a GPU at most, in a row of so many tokens; see `attention.by_kernel`."""
    config = text_config(module)
    heads = cast(int, getattr(config, "num_attention_heads", 1))
    groups = cast("int | None", getattr(config, "num_key_value_heads", None)) or heads
    return heads // groups * row * next(module.parameters()).element_size()


def saved_bytes(module: nn.Module) -> float:
    """Bytes of one token that a forward pass leaves for the backward one, weights left out.

    Every tensor counts once, however many operations keep it or a part of it.
    """
    _, packed = small_tree(module)
    with torch.no_grad():
        states(module, packed)  # what is tried once for each module must not be counted
    # An adapter that stands on a layer already is no parameter of the module.
    on = (lora.adapter_of(layer, always=True) for layer in module.modules())
    below = (t for one in on if one is not None for t in (one.a_RI, one.b_OR))
    own = [*module.parameters(), *module.buffers(), *below]
    known = {t.untyped_storage().data_ptr() for t in own}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        # Without its history: a result that its own operation keeps would never be freed.
        return tensor.detach()

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        held = states(module, packed)  # as long as it is there, no place in memory is used twice
    del held
    return sum(found.values()) / len(packed.ids_N)


def forecast(module: nn.Module, settings: TextTraining, beside: Beside | None = None) -> Forecast:
    """What training `module` will hold; it has no adapters yet, and is not cut over processes.

    What is loaded beside it counts as if it were of the same size.
    """
    beside = beside or Beside()
    trunks = 1 + beside.trunks
    whole = saved_bytes(module)
    every = len(blocks_of(module))
    blocks = len(_trained_blocks(module, settings))
    embedding = embedding_of(module)
    vocab, width = embedding.shape
    inside = whole / every
    if settings.rank:
        # Adapters that are not merged keep their inputs in float32, each its own.
        low = [lora.sides(n)[1] for n in _linears(module, settings) if not lora.merges(n)]
        inside += FLOAT * (sum(low) + settings.rank * len(low)) / blocks
    weights = _bytes([*module.parameters(), *(layer.packed for layer in packed_in(module))])
    copies = (beside.trunks + beside.frozen) * weights
    copies += beside.moving * _trained(module, settings, beside.cut)
    return Forecast(
        state=trunks * _state(module, settings, beside.cut),
        inside=inside,
        input=width * embedding.element_size(),
        logits=vocab * FLOAT,
        blocks=trunks * blocks,
        copies=copies,
        chunk=chunk_of(embedding),
    )


def choose(
    made: Forecast, settings: TextTraining, largest: int, free: float, budget: int
) -> Choice:
    """How a run fits into `free` bytes; what needs least where it does not.

    Args:
        largest: tokens of the largest tree, which is never cut.
        budget: tokens of a micro-batch, if they fit; less where `settings` leaves it open.
    """
    budgets = [budget]
    while not settings.budget and budgets[-1] > largest:
        budgets.append(max(largest, budgets[-1] // 2))
    modes = {"auto": (False, True), "always": (True,), "never": (False,)}
    ways = [Choice(b, again) for again in modes[settings.gradient_checkpointing] for b in budgets]
    for way in ways:
        if made.needed(max(largest, way.budget), way.recompute) <= SHARE * free:
            return way
    return ways[-1]

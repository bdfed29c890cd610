"""Which rows of a request are written together: as many as memory takes, neighbours in length.

What a wave holds is keys and values, those of a prompt once for all of its answers
(`core.generation.prefix_cache`) or once for each (`row_cache.Padded`), filled up to the longest
prompt of the wave: a single long one would take its room for every row, so that it stands in a wave
with few others. It may take what `room` says, by the model's own size of a token, and no more than
`TOKENS`. What is free on the machine is not asked, so that waves depend on the request, the model
and the sort of device alone and give the same bits each time. Where memory ends all the same, the
error says what a request can do about it. Modules on a GPU that nobody uses give way before that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from truing.core.generation import prefix_cache
from truing.core.modelfiles.loaded import MARGIN, free_on, spare
from truing.core.modelfiles.reach import text_config
from truing.errors import Stopped
from truing.faults import short_of_memory

if TYPE_CHECKING:
    from truing.core.sampling import SamplingSettings

ROWS_CPU, ROWS_GPU = 256, 512  # rows of a wave
TOKENS = 2**17  # tokens whose keys and values a wave may hold
# Bytes of these on a CPU. SmolLM2-135M in float32 takes 5.6 GiB for all of them, a model of 8
# billion parameters and 8 key heads, in bfloat16, 16 GiB.
BYTES = 2**33
LEAST = 2**28  # bytes on a GPU that the weights all but fill
SHARE = 4  # a quarter of a GPU's memory: other models and what is computed stand beside it


def token_bytes(module: nn.Module) -> int:
    """Bytes of one token's keys and values in all layers; 0 where the configuration hides it."""
    config = text_config(module)

    def number(name: str) -> int:
        found = getattr(config, name, None)
        return found if isinstance(found, int) else 0

    heads = number("num_attention_heads")
    size = number("head_dim") or (number("hidden_size") // heads if heads else 0)
    layers, groups = number("num_hidden_layers"), number("num_key_value_heads") or heads
    return 2 * layers * groups * size * next(module.parameters()).dtype.itemsize


def room(module: nn.Module) -> int:
    """Bytes that a wave may take: on a GPU a share of all that it has, whatever of it is free.

    No more than half of what the weights leave, but `LEAST` always.
    """
    device = next(module.parameters()).device
    if device.type != "cuda":
        return BYTES
    # In whole GiB, since drivers set aside a little more or less.
    total = round(memory_of(device) / 2**30) * 2**30
    weights = sum(p.numel() * p.element_size() for p in module.parameters())
    return max(LEAST, min(total // SHARE, (total - weights) // 2))


def memory_of(device: torch.device) -> int:
    """Bytes of memory that a GPU has in all."""
    return torch.cuda.get_device_properties(device).total_memory


def waves(
    module: nn.Module, prompts: Sequence[Sequence[int]], settings: SamplingSettings
) -> Iterator[list[tuple[int, int]]]:
    """(prompt, draw) of the rows computed together."""
    if not prompts:
        return
    each = token_bytes(module)
    most = min(TOKENS, room(module) // max(1, each))
    cuda = next(module.parameters()).device.type == "cuda"
    rows = ROWS_GPU if cuda else ROWS_CPU
    wave: list[tuple[int, int]] = []
    nodes, alone = 0, False  # prompts of the wave, and whether each row keeps its own
    taken = 0  # tokens that the wave holds
    for i in sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i)):
        width, new = len(prompts[i]), settings.max_tokens  # the longest so far
        before, alone = alone, not prefix_cache.fits(module, width + new)
        for draw in range(settings.n):
            more = not wave or wave[-1][0] != i
            answers = len(wave) + 1
            held = (answers if alone else nodes + more) * width + answers * new
            if wave and (answers > rows or held > most or alone != before):
                _clear(module, taken * each)
                yield wave
                wave, nodes, more, held = [], 0, True, width + new
            before, taken = alone, held
            wave.append((i, draw))
            nodes += more
    if wave:
        _clear(module, taken * each)
        yield wave


def _clear(module: nn.Module, needed: int) -> None:
    """Drop modules that nobody uses where they stand in a wave's way on a GPU."""
    device = next(module.parameters()).device
    if device.type == "cuda":
        name = device.type  # as modules are kept by
        spare(name, lambda: free_on(name) >= MARGIN * needed, module)


@contextlib.contextmanager
def in_memory() -> Generator[None]:
    """Raise Stopped where memory ends inside the block, with what a request can do about it."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not short_of_memory(error):
            raise
        raise Stopped(
            "this machine has not enough memory to write the answers",
            where="sampling",
            seen=next(iter(str(error).splitlines()), ""),
            fix="Ask for shorter answers (max_tokens), shorten the prompts, end what else runs on "
            "the machine, or take a smaller model",
        ) from error

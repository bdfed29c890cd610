"""Gradient checkpointing: a block keeps its input alone, and what is inside is computed again.

    forward    x_1 = embed(ids), x_{l+1} = block_l(x_l): of each block x_l is kept and nothing else
    backward   block_l(x_l) once more, with what its gradients need; then its gradients

Memory falls from all blocks' activations to one block's and an input for each block, for a second
forward pass; values and gradients stay the same. It is marked on a module, and acts in every pass
through it that gradients flow through. The hand-written block (`block`) does it in its own backward
pass; stock blocks are wrapped in PyTorch's `checkpoint` here. These are computed again as they were
the first time: over the same trees, with the hooks that hung inside then (such as routers that drop
choices), and with the same random numbers. What a hook tells others it tells in the first pass
only: it asks `under_way`.

Source: Training Deep Nets with Sublinear Memory Cost, arXiv 1604.06174.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator

from torch import Tensor, nn

from truing.core.passes.attention import tree_attention
from truing.core.trunk import blocks_of

PLACE = "truing_recompute"  # where a module carries the mark
TABLES = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)
_now = threading.local()


def switch_on(module: nn.Module) -> None:
    """Keep the blocks' inputs alone in all passes through this module from now on."""
    module.__dict__[PLACE] = True


def is_on(module: nn.Module) -> bool:
    """True when `switch_on` has been here."""
    return PLACE in vars(module)


def under_way() -> bool:
    """True while a block is computed again, for hooks inside that report what they see."""
    return getattr(_now, "on", False)


def _hooked(module: nn.Module) -> bool:
    return any(getattr(module, name) for name in TABLES)


class _Hooks:
    """The hooks on the parts of a block, as they are now."""

    def __init__(self, block: nn.Module) -> None:
        self.parts = [m for m in block.modules() if m is not block]
        self.then = {
            id(m): [dict(getattr(m, name)) for name in TABLES] for m in self.parts if _hooked(m)
        }

    @contextlib.contextmanager
    def back(self) -> Generator[None]:
        """Let these hooks, and no others, act on the parts inside the block."""
        changed = [m for m in self.parts if id(m) in self.then or _hooked(m)]
        now = [[getattr(m, name) for name in TABLES] for m in changed]
        for module in changed:
            tables = self.then.get(id(module), [{} for _ in TABLES])
            for name, table in zip(TABLES, tables, strict=True):
                setattr(module, name, table)
        try:
            yield
        finally:
            for module, tables in zip(changed, now, strict=True):
                for name, table in zip(TABLES, tables, strict=True):
                    setattr(module, name, table)


@contextlib.contextmanager
def _again(module: nn.Module, hooks: _Hooks) -> Generator[None]:
    with tree_attention(module), hooks.back():
        _now.on = True
        try:
            yield
        finally:
            _now.on = False


def wrapped(block: nn.Module, module: nn.Module) -> Callable[..., object]:
    """The forward pass of a stock block of `module` that keeps its input alone."""
    from torch.utils.checkpoint import checkpoint

    stock = block.forward

    def forward(hidden_states: Tensor, *args: object, **named: object) -> object:
        hooks, first = _Hooks(block), True

        def compute(x: Tensor) -> object:
            nonlocal first
            if first:
                first = False
                return stock(x, *args, **named)
            with _again(module, hooks):
                return stock(x, *args, **named)

        return checkpoint(compute, hidden_states, use_reentrant=False)

    return forward


def plain_blocks(module: nn.Module) -> list[nn.Module]:
    """Blocks that are computed as transformers wrote them: nothing stands in their place."""
    return [b for b in blocks_of(module) if "forward" not in vars(b)]

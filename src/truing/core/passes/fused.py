"""Put the hand-written block (`block`) into a stock transformers module for one pass.

It goes into every block that it fits: float32 on the CPU, a Llama's parts and no others, nothing
that listens or acts inside, and, tried once for each kind (see `tried`), the stock block's own
values and gradients. All others run as transformers wrote them, so that adapters of other
libraries, norms of queries and keys, hooks and edits inside a block are never passed over.

Where a module is marked by `recompute`, passes with gradients keep the inputs of blocks alone, of
both sorts.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Generator, Hashable
from functools import cache, partial
from typing import cast

import torch
from torch import Tensor, nn

from truing.core.batch.layout import Layout
from truing.core.modelfiles.lora import adapter_of
from truing.core.passes import recompute
from truing.core.passes.attention import tree_attention
from truing.core.passes.block import NORMS, PRODUCTS, run
from truing.core.passes.tried import HOOKS, Tried, kind_of
from truing.core.tree import Segment
from truing.errors import InputError

PARTS = {"self_attn", "mlp", *NORMS}
TENSORS = {f"{n}.{p}" for n in PRODUCTS for p in ("weight", "bias")} | {
    f"{n}.weight" for n in NORMS
}
HALVED = "truing_halved"  # marks a module whose shards are gathered in bfloat16
TOLERANCE = 1e-4  # of the largest value, when a block is tried against the stock one
_same: Tried[bool] = Tried()


def _window(block: nn.Module) -> int | None:
    """Tokens that the block's attention looks back; None when all."""
    attn = block.get_submodule("self_attn")
    if hasattr(attn, "sliding_window"):
        return cast("int | None", attn.sliding_window)
    return cast("int | None", getattr(getattr(attn, "config", None), "sliding_window", None))


def _shaped(block: nn.Module) -> bool:
    """True for a block that has the parts of a Llama's and no others."""
    if {n for n, _ in block.named_children()} != PARTS:
        return False
    linears = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
    if set(linears) != set(PRODUCTS) or any(type(m) is not nn.Linear for m in linears.values()):
        return False
    tensors = dict(block.named_parameters(remove_duplicate=False))
    attn = block.get_submodule("self_attn")
    return (
        set(tensors) <= TENSORS
        and len(set(map(id, tensors.values()))) == len(tensors)
        and all(p.dtype == torch.float32 and p.device.type == "cpu" for p in tensors.values())
        and all(hasattr(attn, n) for n in ("head_dim", "scaling"))
        and all(hasattr(block.get_submodule(n), "variance_epsilon") for n in NORMS)
    )


def _untouched(block: nn.Module) -> bool:
    """True while nothing inside the block listens or acts in the place of its stock parts."""
    for module in block.modules():
        if module is block:
            continue  # what hangs on the block itself is called with it as ever
        if any(getattr(module, name) for name in HOOKS):
            return False
        if "forward" in vars(module) and adapter_of(module, always=True) is None:
            return False
    attn = block.get_submodule("self_attn")
    return "forward" not in vars(block) and not (block.training and attn.attention_dropout)


def _alike(block: nn.Module, module: nn.Module) -> bool:
    """True when the block and its stock self agree on a small tree, in values and gradients."""
    rotary = next((m for n, m in module.named_modules() if n.endswith("rotary_emb")), None)
    if rotary is None or "position_embeddings" not in inspect.signature(block.forward).parameters:
        return False
    layout = Layout((Segment(0, 5, ()), Segment(5, 9, ((0, 5),)), Segment(9, 12, ((0, 5),))))
    width = cast(Tensor, block.get_submodule(NORMS[0]).weight).shape[0]
    x_1ND = torch.randn(1, 12, width, generator=torch.Generator().manual_seed(0))
    at_1N = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 8, 5, 6, 7]])
    found: list[tuple[Tensor, Tensor]] = []
    with torch.inference_mode(False), torch.enable_grad(), tree_attention(module):
        tables = cast("tuple[Tensor, Tensor]", rotary(x_1ND, at_1N))
        for fast in (True, False):
            leaf = x_1ND.clone().requires_grad_()
            if fast:
                out = run(block, layout, leaf, tables)
            else:  # past the hooks of the block itself, which are not its own work
                out = block.forward(leaf, position_embeddings=tables, tree=layout)
            out = cast(Tensor, out[0] if isinstance(out, tuple) else out)
            found.append((out.detach(), torch.autograd.grad(out.square().sum(), leaf)[0]))
    return all(
        float((a - b).abs().max()) <= TOLERANCE * float(b.abs().max()) for a, b in zip(*found)
    )


def _fits(
    block: nn.Module,
    module: nn.Module,
    longest: int,
    kind: Callable[[], Hashable | None],
    name: str,
) -> bool:
    if HALVED in vars(module):  # its shards are in float32, what it computes with is not
        return False
    if not hasattr(block, "self_attn") or not _shaped(block) or not _untouched(block):
        return False
    window = _window(block)
    if window is not None and window < longest:
        return False
    return _same(block, kind, partial(_tried, block, module), name)


def _tried(block: nn.Module, module: nn.Module) -> bool:
    try:
        return _alike(block, module)
    except (InputError, TypeError):  # such as a forward that needs more arguments
        return False


def _forward(
    block: nn.Module,
    hidden_states: Tensor,
    *,
    position_embeddings: tuple[Tensor, Tensor],
    tree: Layout,
    again: bool = False,
    **_: object,
) -> Tensor:
    return run(block, tree, hidden_states, position_embeddings, again)


@contextlib.contextmanager
def fused(module: nn.Module, longest: int) -> Generator[None]:
    """Compute every block of `module` that allows it by hand, inside the block of this `with`.

    To be used within `attention.tree_attention`, which keeps other threads out.

    Args:
        module: a causal language model that is called with `tree=` a layout.
        longest: tokens of the longest row.
    """
    again = recompute.is_on(module) and torch.is_grad_enabled()
    changed: list[nn.Module] = []
    try:
        kind = cache(partial(kind_of, module))  # as it is before anything is put into it
        named = module.named_modules()
        for block in [b for n, b in named if _fits(b, module, longest, kind, n)]:
            block.forward = partial(_forward, block, again=again)
            changed.append(block)
        for block in recompute.plain_blocks(module) if again else ():
            block.forward = recompute.wrapped(block, module)
            changed.append(block)
        yield
    finally:
        for block in changed:
            del block.forward

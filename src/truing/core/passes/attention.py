"""Attention over packed prefix trees, given to stock transformers models by name.

Registered with transformers' attention interface as "truing_tree"; `tree_attention` switches a
module to it for one forward pass. Each node's queries attend to its ancestors' keys and, causally,
to its own: a prompt attends to itself once, each answer to the prompt and to itself. No token of
another tree or branch is ever multiplied.

On the CPU in float32 the forward pass is PyTorch's flash kernel, piece by piece
(`core.batch.layout`). Its own backward kernel is slow there, so the gradients are formed here. With
S = Q K^T (scale folded into Q), L the log-sum-exp of each row that the forward pass kept, and dO
the upstream gradient:

    P = exp(S - L)    dV = P^T dO    dS = P * (dO V^T - rowsum(dO * O))    dQ = dS K    dK = dS^T Q

P of one block of queries needs nothing of the others, so never more than a block of P of some heads
exists. Keys of ancestors and a segment's own are joined once, their gradients parted at its end.

Shapes: N tokens, H query heads, G key heads, R = H / G query heads that share one, D features a
head. Queries are kept as [G, N, R, D], so that a key head's queries are one matrix of rows.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Generator
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from truing.core.batch.layout import Block, Layout, joined, put_back, sums
from truing.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "truing_tree"
KNOWN = "Known to work: Llama, Mistral, Qwen2, Qwen3, Gemma 3 and their like"
MOST = 2**20  # numbers of P that exist at a time, unless one key head has more
FLASH = 256  # largest head that the flash kernel of a GPU takes
FLASHES = (8, 0)  # the oldest generation of GPUs that has it
_locks: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_guard = threading.Lock()


def forward(
    q_GNRD: Tensor,
    k_GND: Tensor,
    v_GND: Tensor,
    layout: Layout,
) -> tuple[Tensor, Tensor]:
    """Output [G, N, R, D] and log-sum-exp [G, N, R] on the CPU; the scale is in q.

    The output lies in memory token by token, as the product that follows wants it.
    """
    heads, tokens, shared, size = q_GNRD.shape
    out_GNRD = q_GNRD.new_empty(tokens, heads, shared, size).transpose(0, 1)
    lse_GNR = q_GNRD.new_empty(heads, tokens, shared)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    for segment, pieces in zip(layout.segments, layout.cut(q_GNRD, shared)):
        keys_G1TD, values_G1TD = (joined(x, segment)[:, None] for x in (k_GND, v_GND))
        for piece in pieces:
            part, own, mask = slice(piece.start, piece.stop), piece.stop - piece.start, piece.mask
            k, v = (x[:, :, : piece.last] for x in (keys_G1TD, values_G1TD))
            if mask is not None and len(mask) == own * shared:
                q = q_GNRD[:, part].reshape(heads, 1, -1, size)
                out, lse = kernel(q, k, v, 0.0, False, attn_mask=mask, scale=1.0)
                out_GNRD[:, part] = out.reshape(heads, own, shared, size)
                lse_GNR[:, part] = lse.reshape(heads, own, shared)
                continue
            q = q_GNRD[:, part].transpose(1, 2)
            k, v = (x.expand(-1, shared, -1, -1) for x in (k, v))
            out, lse = kernel(q, k, v, 0.0, mask is None, attn_mask=mask, scale=1.0)
            out_GNRD[:, part] = out.transpose(1, 2)
            lse_GNR[:, part] = lse.view(heads, shared, own).transpose(1, 2)
    return out_GNRD, lse_GNR


def backward(
    d_GNRD: Tensor,
    q_GNRD: Tensor,
    k_GND: Tensor,
    v_GND: Tensor,
    out_GNRD: Tensor,
    lse_GNR: Tensor,
    layout: Layout,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v on the CPU."""
    heads, _, shared, size = q_GNRD.shape
    dq_GNRD = torch.empty_like(q_GNRD)
    dk_GND, dv_GND = torch.zeros_like(k_GND), torch.zeros_like(v_GND)
    # The heads of a token one below another, [G, N R, ...]: so q, dq and lse lie already.
    d = d_GNRD.contiguous().view(heads, -1, size)
    delta = (d * out_GNRD.reshape(heads, -1, size)).sum(-1, keepdim=True).neg_()
    lse = lse_GNR.neg().view(heads, -1, 1)
    q, dq = q_GNRD.view(heads, -1, size), dq_GNRD.view(heads, -1, size)
    for segment, blocks in zip(layout.segments, layout.blocks()):
        keys, values = joined(k_GND, segment), joined(v_GND, segment)
        dk, dv = sums(dk_GND, segment), sums(dv_GND, segment)
        for x, g in [(b, g) for b in blocks for g in _turns(heads, b, shared)]:
            rows, seen = slice(x.start * shared, x.stop * shared), slice(x.first, x.last)
            k, v = keys[g, seen], values[g, seen]
            p = torch.baddbmm(lse[g, rows], q[g, rows], k.transpose(1, 2)).exp_()
            p_GNRT = p.view(len(k), x.stop - x.start, shared, -1)
            p_GNRT[..., x.start - x.stop :].masked_fill_(x.hidden, 0.0)
            if x.far is not None:
                p_GNRT.masked_fill_(x.far, 0.0)
            dv[g, seen].baddbmm_(p.transpose(1, 2), d[g, rows])
            p.mul_(torch.baddbmm(delta[g, rows], d[g, rows], v.transpose(1, 2)))
            dq[g, rows].baddbmm_(p, k, beta=0)
            dk[g, seen].baddbmm_(p.transpose(1, 2), q[g, rows])
        put_back(dk, dk_GND, segment)
        put_back(dv, dv_GND, segment)
    return dq_GNRD, dk_GND, dv_GND


def _turns(heads: int, block: Block, shared: int) -> list[slice]:
    """Key heads that are computed together, so that P stays small."""
    size = (block.stop - block.start) * shared * (block.last - block.first)
    step = max(1, MOST // size)
    return [slice(g, g + step) for g in range(0, heads, step)]


class _Tree(torch.autograd.Function):
    """`forward` and `backward` above as one differentiable function."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: FunctionCtx,
        q_GNRD: Tensor,
        k_GND: Tensor,
        v_GND: Tensor,
        layout: Layout,
    ) -> Tensor:
        """Output [G, N, R, D]."""
        out_GNRD, lse_GNR = forward(q_GNRD, k_GND, v_GND, layout)
        ctx.save_for_backward(q_GNRD, k_GND, v_GND, out_GNRD, lse_GNR)
        ctx.layout = layout  # type: ignore[attr-defined]
        return out_GNRD

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, up: Tensor) -> tuple[object, ...]:  # type: ignore[override]
        """Gradients of q, k and v."""
        saved = cast("tuple[Tensor, ...]", ctx.saved_tensors)  # type: ignore[attr-defined]
        return (*backward(up, *saved, ctx.layout), None)  # type: ignore[attr-defined]


def attend(
    query_HND: Tensor,
    key_GND: Tensor,
    value_GND: Tensor,
    layout: Layout,
    scale: float | None = None,
) -> Tensor:
    """Attention [N, H, D] of every segment's queries to what it sees; G divides H."""
    heads, tokens, size = query_HND.shape
    groups = key_GND.shape[0]
    factor = float(size**-0.5) if scale is None else scale
    plain = query_HND.device.type == "cpu" and query_HND.dtype == torch.float32
    if plain and value_GND.shape[-1] == size:
        q_GNRD = (query_HND * factor).view(groups, -1, tokens, size).transpose(1, 2).contiguous()
        k_GND, v_GND = key_GND.contiguous(), value_GND.contiguous()
        out_GNRD = cast(Tensor, _Tree.apply(q_GNRD, k_GND, v_GND, layout))
        return out_GNRD.transpose(0, 1).reshape(tokens, heads, size)
    made: list[Tensor] = []
    for s, mask in zip(layout.segments, layout.masks(query_HND, _stacked(query_HND, groups))):
        q = query_HND[None, :, s.start : s.stop]
        k, v = joined(key_GND, s)[None], joined(value_GND, s)[None]
        made.append(by_kernel(q, k, v, mask, factor))
    return torch.cat(made, 2)[0].transpose(0, 1)


def on_device(module: nn.Module, device: str) -> nn.Module:
    """The module on its device. On a GPU attention does without cuDNN from then on.

    It plans for each shape anew, which takes longer than to compute it: no two nodes are of one.
    """
    if torch.device(device).type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)
    return module.to(device)


def _stacked(query_HND: Tensor, groups: int) -> int:
    """How many query heads stand below one another under a mask; see `by_kernel`."""
    return 1 if query_HND.device.type == "cpu" else query_HND.shape[-3] // groups


def _flashes(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= FLASHES


def by_kernel(
    query_1HND: Tensor, key_1GTD: Tensor, value_1GTD: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """Attention [1, H, N, D] by PyTorch's kernels; causal without a mask.

    Where heads share keys, PyTorch holds all scores on a GPU, in float32, unless there is no mask
    and its flash kernel fits. With a mask the queries of heads that share one are rows of one head
    there, [G, R N, D]; else each head gets keys of its own.

    Args:
        mask: [N, T], or [R N, T] where it stands there R times already.
    """
    _, heads, tokens, size = query_1HND.shape
    groups = key_1GTD.shape[1]
    shared = _stacked(query_1HND, groups)
    if mask is not None and shared > 1:
        mask = mask if len(mask) > tokens else mask.repeat(shared, 1)
        rows_1GSD = query_1HND.reshape(1, groups, shared * tokens, size)
        made = F.scaled_dot_product_attention(rows_1GSD, key_1GTD, value_1GTD, mask, scale=scale)
        return made.reshape(1, heads, tokens, -1)
    flash = query_1HND.dtype.itemsize == 2 and size == value_1GTD.shape[-1] <= FLASH
    if shared > 1 and not (flash and _flashes(query_1HND.device)):
        key_1GTD, value_1GTD = (x.repeat_interleave(shared, 1) for x in (key_1GTD, value_1GTD))
        groups = heads
    return F.scaled_dot_product_attention(
        query_1HND,
        key_1GTD,
        value_1GTD,
        mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=heads != groups,
    )


def _interface(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    tree: Layout | None = None,
    sliding_window: int | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """What transformers calls in each attention layer: [1, N, H, D] and no weights."""
    odd = {n for n in ("softcap", "s_aux", "position_bias") if others.get(n) is not None}
    if dropout:
        odd.add("dropout")
    if odd:
        raise InputError(
            "this attention cannot be computed exactly on trees", seen=sorted(odd), fix=KNOWN
        )
    if tree is None:
        raise InputError(
            "the architecture does not hand keyword arguments to its attention layers",
            seen=type(module).__name__,
            fix=KNOWN,
        )
    return attend(query[0], key[0], value[0], tree.within(sliding_window), scaling)[None], None


@contextlib.contextmanager
def alone(module: nn.Module) -> Generator[None]:
    """Let passes of other threads through the module wait until the block ends."""
    with _guard:
        lock = _locks.setdefault(module, threading.RLock())
    with lock:
        yield


@contextlib.contextmanager
def switched(module: nn.Module, name: str) -> Generator[None]:
    """Let a module use the attention of that name inside the block; it is as before after it.

    Passes of other threads through the same module wait until then: which attention a module uses
    is kept in its configuration, which all of them read.
    """
    config = cast("PreTrainedModel", module).config
    with alone(module):
        before = config._attn_implementation  # pyright: ignore[reportPrivateUsage]
        config._attn_implementation = name  # pyright: ignore[reportPrivateUsage]
        try:
            yield
        finally:
            config._attn_implementation = before  # pyright: ignore[reportPrivateUsage]


@contextlib.contextmanager
def tree_attention(module: nn.Module) -> Generator[None]:
    """Let a transformers module use tree attention inside the block; see `switched`."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _interface)
    with switched(module, NAME):
        yield

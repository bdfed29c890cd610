"""Attention over packed prefix trees, given to stock transformers models by name.

Registered with transformers' attention interface as "truing_tree"; `tree_attention` switches a
module to it for one forward pass. Each node's queries attend to its ancestors' keys and, causally,
to its own: a prompt attends to itself once, each answer to the prompt and to itself. No token of
another tree or branch is ever multiplied.

On the CPU in float32 the forward pass is PyTorch's flash kernel, node by node. Its own backward
kernel is slow there, so the gradients are formed here. With S = Q K^T (scale folded into Q), L the
log-sum-exp of each row that the forward pass kept, and dO the upstream gradient:

    P = exp(S - L)    dV = P^T dO    dS = P * (dO V^T - rowsum(dO * O))    dQ = dS K    dK = dS^T Q

P of one block of queries and one range of keys needs nothing of the others, so ancestors and blocks
below the diagonal are plain products and never more than a block of P exists.

In a layer with a window of W a token sees the last W of its row, itself among them. Nodes are cut
into pieces of about that length, each with the W - 1 tokens before it (`Layout.within`).

Shapes: N tokens, H query heads, G key heads, R = H / G query heads that share one, D features a
head. Queries are kept as [G, N, R, D], so that a key head's queries are one matrix of rows.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from truing.core.tree import Segment
from truing.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "truing_tree"
KNOWN = "Known to work: Llama, Mistral, Qwen2, Qwen3, Gemma 3 and their like"
BLOCK = 128  # queries of a block in the backward pass
ALIGNED = 8  # numbers at whose multiples rows of a mask begin on a GPU
FLASH = 256  # largest head that the flash kernel of a GPU takes
_locks: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_guard = threading.Lock()


def _joined(x_GND: Tensor, segment: Segment) -> Tensor:
    """Keys or values that a segment sees: its ancestors' and its own, along the second-last dim."""
    ranges = [*segment.before, (segment.start, segment.stop)]
    if len(ranges) > 1 and ranges[-2][1] == segment.start:
        ranges[-2:] = [(ranges[-2][0], segment.stop)]
    parts = [x_GND[..., a:b, :] for a, b in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -2)


def _mask(own: int, seen: int, like: Tensor, shared: int, window: int) -> Tensor:
    """Additive mask [shared own, seen]: the last `own` keys causally, all earlier ones fully.

    With a window, only the last `window` of them.
    """
    # Kernels of GPUs copy a mask whose rows do not begin at multiples of eight numbers.
    wide = seen if like.device.type == "cpu" else -(-seen // ALIGNED) * ALIGNED
    blocked = torch.full((own, wide), float("-inf"), dtype=like.dtype, device=like.device)
    far = blocked.tril(seen - own - window) if 0 < window < seen else None
    blocked.triu_(seen - own + 1)
    if far is not None:
        blocked += far
    return (blocked if shared == 1 else blocked.repeat(shared, 1))[:, :seen]


def _last(ranges: Sequence[tuple[int, int]], count: int) -> tuple[tuple[int, int], ...]:
    """The last `count` places of ranges."""
    kept: list[tuple[int, int]] = []
    for a, b in reversed(ranges):
        a = max(a, b - count)
        if a < b:
            kept.append((a, b))
            count -= b - a
    return tuple(reversed(kept))


def _pieces(segments: Sequence[Segment], window: int) -> Iterator[Segment]:
    """Segments cut so that each sees little more than its own tokens can."""
    step = max(window, BLOCK)
    for s in segments:
        for i in range(s.start, s.stop, step):
            before = _last((*s.before, (s.start, i)), window - 1)
            yield Segment(i, min(i + step, s.stop), before)


class Layout:
    """Where the nodes of a micro-batch lie, and their masks, made once for all layers.

    Args:
        window: how many tokens of its row a token sees, itself among them; 0 for all.
    """

    def __init__(self, segments: Iterable[Segment], window: int = 0) -> None:
        self.segments, self.window = tuple(segments), window
        self._seen = [s.stop - s.start + sum(b - a for a, b in s.before) for s in self.segments]
        self.longest = max(self._seen)
        self._masks: dict[tuple[torch.dtype, torch.device, int], list[Tensor | None]] = {}
        self._within: dict[int, Layout] = {}

    def within(self, window: int | None) -> Layout:
        """The same tokens for a layer with a window; itself where no row is longer."""
        if window is None or self.longest <= window:
            return self
        if window not in self._within:
            self._within[window] = Layout(_pieces(self.segments, window), window)
        return self._within[window]

    def masks(self, like: Tensor, shared: int = 1) -> list[Tensor | None]:
        """The mask of each node, `shared` times one below another; None where all is its own."""
        key = (like.dtype, like.device, shared)
        if key not in self._masks:
            self._masks[key] = [
                _mask(s.stop - s.start, seen, like, shared, self.window)
                if s.before or 0 < self.window < seen
                else None
                for s, seen in zip(self.segments, self._seen)
            ]
        return self._masks[key]


def forward(
    q_GNRD: Tensor,
    k_GND: Tensor,
    v_GND: Tensor,
    layout: Layout,
) -> tuple[Tensor, Tensor]:
    """Output [G, N, R, D] and log-sum-exp [G, N, R] on the CPU; the scale is in q.

    The output lies in memory token by token, as the product that follows wants it.
    """
    out_GNRD = torch.empty_like(q_GNRD.transpose(0, 1), memory_format=torch.contiguous_format)
    out_GNRD = out_GNRD.transpose(0, 1)
    lse_GNR = q_GNRD.new_empty(q_GNRD.shape[:3])
    groups = q_GNRD.shape[2]
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    for s, mask in zip(layout.segments, layout.masks(q_GNRD)):
        k, v = (_joined(x, s)[:, None].expand(-1, groups, -1, -1) for x in (k_GND, v_GND))
        part = slice(s.start, s.stop)
        q = q_GNRD[:, part].transpose(1, 2)
        out, lse = kernel(q, k, v, 0.0, mask is None, attn_mask=mask, scale=1.0)
        out_GNRD[:, part] = out.transpose(1, 2)
        lse_GNR[:, part] = lse.view(lse.shape[0], groups, -1).transpose(1, 2)
    return out_GNRD, lse_GNR


def _blocks(layout: Layout) -> Iterator[tuple[int, int, int, int, bool, int]]:
    """(first query, end, first key, end, last block of keys is causal, far) that cover all pairs.

    far: the diagonal at and below which keys lie before a query's window; -BLOCK where none do.
    """
    none, window = -BLOCK, layout.window
    for s in layout.segments:
        own = sum(b - a for a, b in s.before)  # place in the row of the segment's first token
        for i in range(s.start, s.stop, BLOCK):
            j = min(i + BLOCK, s.stop)
            at, first = 0, own + i - s.start - window + 1  # places of a range, of what i sees
            for a, b in (*s.before, (s.start, j)):
                skip = max(first - at, 0) if window else 0
                if a + skip < b:
                    far = first - at - skip - 1 if window else none
                    yield i, j, a + skip, b, a == s.start, far
                at += b - a


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
    dq_GNRD = torch.zeros_like(q_GNRD)
    dk_GND, dv_GND = torch.zeros_like(k_GND), torch.zeros_like(v_GND)
    delta_GNR = (d_GNRD * out_GNRD).sum(-1).neg_()
    lse_GNR = lse_GNR.neg()
    heads, _, shared, size = q_GNRD.shape
    for i, j, a, b, causal, far in _blocks(layout):
        hidden = before = None
        if causal:  # only the last j - i keys lie on the diagonal
            square = torch.ones(j - i, j - i, dtype=torch.bool, device=d_GNRD.device)
            hidden = square.triu_(1)[:, None]
        if far > i - j:
            reach = torch.ones(j - i, b - a, dtype=torch.bool, device=d_GNRD.device)
            before = reach.tril_(far)[:, None]
        for g in range(heads):
            q, d = (x[g, i:j].reshape(-1, size) for x in (q_GNRD, d_GNRD))
            k, v = k_GND[g, a:b], v_GND[g, a:b]
            p = torch.addmm(lse_GNR[g, i:j].reshape(-1, 1), q, k.t()).exp_()
            if hidden is not None:
                p.view(j - i, shared, b - a)[:, :, i - b :].masked_fill_(hidden, 0.0)
            if before is not None:
                p.view(j - i, shared, b - a).masked_fill_(before, 0.0)
            dv_GND[g, a:b].addmm_(p.t(), d)
            p.mul_(torch.addmm(delta_GNR[g, i:j].reshape(-1, 1), d, v.t()))
            dq_GNRD[g, i:j].view(-1, size).addmm_(p, k)
            dk_GND[g, a:b].addmm_(p.t(), q)
    return dq_GNRD, dk_GND, dv_GND


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
        k, v = _joined(key_GND, s)[None], _joined(value_GND, s)[None]
        made.append(by_kernel(q, k, v, mask, factor))
    return torch.cat(made, 2)[0].transpose(0, 1)


def _stacked(query_HND: Tensor, groups: int) -> int:
    """How many query heads stand below one another under a mask; see `by_kernel`."""
    return 1 if query_HND.device.type == "cpu" else query_HND.shape[-3] // groups


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
    if shared > 1 and not flash:
        key_1GTD, value_1GTD = (x.repeat_interleave(shared, 1) for x in (key_1GTD, value_1GTD))
        groups = heads
    return F.scaled_dot_product_attention(
        query_1HND, key_1GTD, value_1GTD, mask, is_causal=mask is None, scale=scale,
        enable_gqa=heads != groups,
    )  # fmt: skip


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
def switched(module: nn.Module, name: str) -> Generator[None]:
    """Let a module use the attention of that name inside the block; it is as before after it.

    Passes of other threads through the same module wait until then: which attention a module uses
    is kept in its configuration, which all of them read.
    """
    with _guard:
        lock = _locks.setdefault(module, threading.RLock())
    config = cast("PreTrainedModel", module).config
    with lock:
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

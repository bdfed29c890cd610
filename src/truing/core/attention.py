"""Attention over packed prefix trees, given to stock transformers models by name.

Registered with transformers' attention interface as "truing_tree"; `tree_attention` switches a
module to it for one forward pass. Each node's queries attend to its ancestors' keys and, causally,
to its own: a prompt attends to itself once, each answer to the prompt and to itself. No token of
another tree or branch is ever multiplied.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from truing.core.tree import Segment
from truing.errors import InputError

NAME = "truing_tree"


def _keys(x_1HND: Tensor, segment: Segment) -> Tensor:
    """Keys or values that a segment sees: its ancestors' and its own."""
    ranges = [*segment.before, (segment.start, segment.stop)]
    if len(ranges) > 1 and ranges[-2][1] == segment.start:
        ranges[-2:] = [(ranges[-2][0], segment.stop)]
    parts = [x_1HND[:, :, a:b] for a, b in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def attend(
    query_1HND: Tensor,
    key_1GND: Tensor,
    value_1GND: Tensor,
    segments: Sequence[Segment],
    scale: float | None = None,
) -> Tensor:
    """Attention [1, H, N, D] of every segment's queries to what it sees; G divides H."""
    grouped = query_1HND.shape[1] != key_1GND.shape[1]
    made: list[Tensor] = []
    for s in segments:
        q = query_1HND[:, :, s.start : s.stop]
        k, v = _keys(key_1GND, s), _keys(value_1GND, s)
        own, seen = q.shape[2], k.shape[2]
        mask = None
        if own != seen:
            mask = torch.ones(own, seen, dtype=torch.bool, device=q.device).tril(seen - own)
        made.append(
            F.scaled_dot_product_attention(
                q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
            )
        )
    return torch.cat(made, 2)


def _interface(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    tree: Sequence[Segment] | None = None,
    sliding_window: int | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """What transformers calls in each attention layer; [1, N, H, D] and no weights."""
    odd = {n for n in ("softcap", "s_aux", "position_bias") if others.get(n) is not None}
    if dropout:
        odd.add("dropout")
    if odd:
        raise InputError("this attention cannot be computed exactly on trees", seen=sorted(odd))
    if tree is None:
        raise InputError(
            "the architecture does not hand keyword arguments to its attention layers",
            seen=type(module).__name__,
        )
    if sliding_window is not None and sliding_window < _longest(tree):
        raise InputError(
            f"a row is longer than the attention window of {sliding_window} tokens",
            seen=_longest(tree),
            fix="Shorten such rows: windows are not computed on trees",
        )
    return attend(query, key, value, tree, scaling).transpose(1, 2), None


def _longest(tree: Sequence[Segment]) -> int:
    return max(s.stop - s.start + sum(b - a for a, b in s.before) for s in tree)


@contextlib.contextmanager
def tree_attention(module: nn.Module) -> Generator[None]:
    """Let a transformers module use tree attention inside the block; it is as before after it."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _interface)
    config = module.config
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before

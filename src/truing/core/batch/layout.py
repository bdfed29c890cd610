"""Where the nodes of a micro-batch lie, which keys each of them sees, and the masks that say so.

All of it is made once for all layers. In a layer with a window of W a token sees the last W of its
row, itself among them: nodes are cut into pieces of about that length, each with the W - 1 tokens
before it (`Layout.within`).

Shapes: N tokens, G key heads, R query heads that share one, D features a head.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from truing.core.tree import Segment

BLOCK = 128  # queries of a block on the CPU
LONG = 1024  # keys beyond which masks would take more memory than they save time
ALIGNED = 8  # numbers at whose multiples rows of a mask begin on a GPU


@dataclass(frozen=True)
class Piece:
    """Queries [start, stop) of a segment that the CPU's kernel reads in one call.

    Args:
        last: how many of the segment's keys they see, in the order of `joined`.
        mask: [n, last], or [n R, last] with a query's row R times; None where all is causal.
    """

    start: int
    stop: int
    last: int
    mask: Tensor | None


@dataclass(frozen=True)
class Block:
    """Queries [start, stop) of a segment and the keys [first, last) that they see.

    Args:
        first, last: in the order of `joined`.
        hidden: of the last keys, one for each query, those that come after it: [n, 1, n].
        far: keys that lie before a query's window, [n, 1, keys].
    """

    start: int
    stop: int
    first: int
    last: int
    hidden: Tensor
    far: Tensor | None


def _seen(s: Segment) -> int:
    """Keys that a segment sees: its ancestors' and its own."""
    return s.stop - s.start + sum(b - a for a, b in s.before)


def _ranges(s: Segment) -> list[tuple[int, int]]:
    """Where the keys lie that a segment sees, neighbours as one range."""
    found = [*s.before, (s.start, s.stop)]
    if len(found) > 1 and found[-2][1] == s.start:
        found[-2:] = [(found[-2][0], s.stop)]
    return found


def joined(x_GND: Tensor, segment: Segment) -> Tensor:
    """Keys or values that a segment sees: its ancestors' and its own, along the second-last dim.

    A view where they lie side by side.
    """
    parts = [x_GND[..., a:b, :] for a, b in _ranges(segment)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -2)


def sums(total_GND: Tensor, segment: Segment) -> Tensor:
    """Where gradients of `joined` are added up: in `total_GND` itself where that is a view."""
    ranges = _ranges(segment)
    if len(ranges) == 1:
        return total_GND[:, slice(*ranges[0])]
    return total_GND.new_zeros(len(total_GND), _seen(segment), total_GND.shape[-1])


def put_back(part_GTD: Tensor, total_GND: Tensor, segment: Segment) -> None:
    """Add what `sums` gave to the total, unless it is there already."""
    ranges = _ranges(segment)
    if len(ranges) > 1:
        parts = part_GTD.split([b - a for a, b in ranges], 1)
        for (a, b), part in zip(ranges, parts, strict=True):
            total_GND[:, a:b] += part


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
        self._seen = [_seen(s) for s in self.segments]
        self.longest = max(self._seen)
        self._masks: dict[tuple[torch.dtype, torch.device, int], list[Tensor | None]] = {}
        self._within: dict[int, Layout] = {}
        self._cut: dict[int, list[list[Piece]]] = {}
        self._made: dict[tuple[int, int, int], Tensor] = {}
        self._blocks: list[list[Block]] = []

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

    def cut(self, like: Tensor, shared: int) -> list[list[Piece]]:
        """Pieces of each segment for the CPU's kernel, with their masks.

        It computes a causal node in squares of 512 keys, of which it hides half. Pieces of BLOCK
        queries with masks need three quarters of that, and with a mask the queries of the `shared`
        heads that read the same keys are rows of one matrix.
        """
        if shared not in self._cut:
            self._cut[shared] = [
                [
                    Piece(i, j, _seen(s) - (s.stop - j), self._mask(s, i, j, like, shared))
                    for i, j in self._slices(s)
                ]
                for s in self.segments
            ]
        return self._cut[shared]

    def _slices(self, s: Segment) -> list[tuple[int, int]]:
        """A segment in pieces of BLOCK queries; whole where a window or its length forbids it."""
        if self.window or (s.stop - s.start > LONG and not s.before):
            return [(s.start, s.stop)]
        return list(itertools.pairwise([*range(s.start, s.stop, BLOCK), s.stop]))

    def _mask(self, s: Segment, start: int, stop: int, like: Tensor, shared: int) -> Tensor | None:
        own, seen = stop - start, _seen(s) - (s.stop - stop)
        if own == seen and not 0 < self.window < seen:
            return None
        key = own, seen, shared
        if key not in self._made:
            mask = _mask(own, seen, like, 1, self.window)
            self._made[key] = mask if seen > LONG else mask.repeat_interleave(shared, 0)
        return self._made[key]

    def blocks(self) -> list[list[Block]]:
        """For each segment its queries and the keys that they see, for gradients on the CPU."""
        if not self._blocks:
            self._blocks = [list(_blocks(s, self.window)) for s in self.segments]
        return self._blocks


def _blocks(s: Segment, window: int) -> Iterator[Block]:
    past = _seen(s) - (s.stop - s.start)
    for i in range(s.start, s.stop, BLOCK):
        j = min(i + BLOCK, s.stop)
        own, at = j - i, past + i - s.start  # place of the block's first token in its row
        first = max(at - window + 1, 0) if window else 0
        far, reach = None, at - window - first  # of the first query, the last key too far away
        if window and reach > -own:
            far = torch.ones(own, at + own - first, dtype=torch.bool).tril_(reach)[:, None]
        hidden = torch.ones(own, own, dtype=torch.bool).triu_(1)[:, None]
        yield Block(i, j, first, at + own, hidden, far)

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
    """Queries that the CPU's kernel reads in one call.

    Args:
        mask: [n, keys], or [n R, keys] with a query's row R times; None where all is causal.
    """

    segment: Segment
    mask: Tensor | None


@dataclass(frozen=True)
class Block:
    """Queries [start, stop) and one range [first, last) of the keys that they see.

    Args:
        hidden: of the last keys, one for each query, those that come after it: [n, 1, n].
        far: keys that lie before a query's window, [n, 1, keys].
    """

    start: int
    stop: int
    first: int
    last: int
    hidden: Tensor | None
    far: Tensor | None


def _seen(s: Segment) -> int:
    """Keys that a segment sees: its ancestors' and its own."""
    return s.stop - s.start + sum(b - a for a, b in s.before)


def joined(x_GND: Tensor, segment: Segment) -> Tensor:
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
        self._seen = [_seen(s) for s in self.segments]
        self.longest = max(self._seen)
        self._masks: dict[tuple[torch.dtype, torch.device, int], list[Tensor | None]] = {}
        self._within: dict[int, Layout] = {}
        self._cut: dict[int, list[Piece]] = {}
        self._made: dict[tuple[int, int, int], Tensor] = {}
        self._blocks: list[Block] = []

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

    def cut(self, like: Tensor, shared: int) -> list[Piece]:
        """Pieces for the CPU's kernel, with their masks.

        It computes a causal node in squares of 512 keys, of which it hides half. Pieces of BLOCK
        queries with masks need three quarters of that, and with a mask the queries of the `shared`
        heads that read the same keys are rows of one matrix.
        """
        if shared not in self._cut:
            self._cut[shared] = [
                Piece(p, self._mask(p, like, shared))
                for s in self.segments
                for p in self._slices(s)
            ]
        return self._cut[shared]

    def _slices(self, s: Segment) -> list[Segment]:
        """A segment in pieces of BLOCK queries; whole where a window or its length forbids it."""
        if self.window or (s.stop - s.start > LONG and not s.before):
            return [s]
        ends = [*range(s.start + BLOCK, s.stop, BLOCK), s.stop]
        first, rest = Segment(s.start, ends[0], s.before), itertools.pairwise(ends)
        return [first, *(Segment(i, j, (*s.before, (s.start, i))) for i, j in rest)]

    def _mask(self, s: Segment, like: Tensor, shared: int) -> Tensor | None:
        own, seen = s.stop - s.start, _seen(s)
        if not s.before and not 0 < self.window < seen:
            return None
        key = own, seen, shared
        if key not in self._made:
            mask = _mask(own, seen, like, 1, self.window)
            self._made[key] = mask if seen > LONG else mask.repeat_interleave(shared, 0)
        return self._made[key]

    def blocks(self) -> list[Block]:
        """All pairs of a query and a key that it sees, for the backward pass on the CPU."""
        if not self._blocks:
            self._blocks = list(_blocks(self))
        return self._blocks


def _blocks(layout: Layout) -> Iterator[Block]:
    window = layout.window
    for s in layout.segments:
        own = sum(b - a for a, b in s.before)  # place in the row of the segment's first token
        for i in range(s.start, s.stop, BLOCK):
            j = min(i + BLOCK, s.stop)
            at, first = 0, own + i - s.start - window + 1  # places of a range, of what i sees
            for a, b in (*s.before, (s.start, j)):
                skip = max(first - at, 0) if window else 0
                if a + skip < b:
                    hidden = far = None
                    if a == s.start:  # only the last j - i keys lie on the diagonal
                        hidden = torch.ones(j - i, j - i, dtype=torch.bool).triu_(1)[:, None]
                    if window and first - at - skip - 1 > i - j:
                        reach = torch.ones(j - i, b - a - skip, dtype=torch.bool)
                        far = reach.tril_(first - at - skip - 1)[:, None]
                    yield Block(i, j, a + skip, b, hidden, far)
                at += b - a

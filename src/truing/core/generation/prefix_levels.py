"""Keys and values of rows that share their beginnings, in levels, and attention to them.

See `core.generation.prefix_cache`. Neighbouring rows whose prompts are of about one length lie in a
bucket: within it, prompts are filled up to the longest one.

Shapes: B rows, N nodes, W rows of a node at most, S = W R; H query heads on G key heads with
R = H / G; T tokens of a level, D head size, K any last dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from truing.core.passes.products import scores

if TYPE_CHECKING:
    from truing.core.generation.dialogue_cache import Kept

# Tokens that rows must save in all to be worth a bucket of their own, which has its own kernels.
APART_CPU, APART_GPU = 2**11, 2**18


class Level:
    """Keys and values of nodes at one depth, for every layer: [N, G, T, D]."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = list(lengths)
        self.begun = [0] * len(self.lengths)  # tokens of each node that were known before
        self.key: list[Tensor] = []
        self.value: list[Tensor] = []
        self.width = 1
        self.place_B: Tensor | None = None  # where rows stand in [N * W]; None when in that order
        self.mask_B1T: Tensor | None = None  # -inf behind the end of shorter nodes

    def begin(self, node: int, kept: Kept, start: int, stop: int) -> None:
        """Take over a node's first tokens, which are those of `kept` from `start` to `stop`."""
        for layer in range(kept.layers):
            self.take(layer, node, *kept.read(layer, start, stop))
        self.begun[node] = stop - start

    def take(self, layer: int, node: int, key_GTD: Tensor, value_GTD: Tensor) -> None:
        """Store what one layer made of one node's tokens that were not known before."""
        if len(self.key) <= layer:
            heads, _, size = key_GTD.shape
            shape = (len(self.lengths), heads, max(self.lengths), size)
            self.key.append(key_GTD.new_zeros(shape))
            self.value.append(key_GTD.new_zeros(shape))
        new = slice(self.begun[node], self.begun[node] + key_GTD.shape[1])
        self.key[layer][node, :, new] = key_GTD
        self.value[layer][node, :, new] = value_GTD

    def seat(self, node_B: list[int], device: torch.device) -> None:
        """Say under which node each row stands."""
        filled = [0] * len(self.lengths)
        place: list[int] = []
        for node in node_B:
            place.append(filled[node])
            filled[node] += 1
        self.width = max(filled)
        place = [node * self.width + p for node, p in zip(node_B, place)]
        whole = place == list(range(len(self.lengths) * self.width))
        self.place_B = None if whole else torch.tensor(place, device=device)
        longest = max(self.lengths)
        self.mask_B1T = None
        if min(self.lengths) < longest:
            ends_B = torch.tensor([self.lengths[n] for n in node_B], device=device)
            late_BT = torch.arange(longest, device=device) >= ends_B[:, None]
            self.mask_B1T = torch.zeros(late_BT.shape, device=device)
            self.mask_B1T = self.mask_B1T.masked_fill_(late_BT, -torch.inf)[:, None]

    def _spread(self, x_BGRK: Tensor) -> Tensor:
        """Rows to their nodes: [N, G, W * R, K]; empty places hold zeros."""
        _, heads, group, last = x_BGRK.shape
        if self.place_B is not None:
            full = x_BGRK.new_zeros((len(self.lengths) * self.width, heads, group, last))
            x_BGRK = full.index_copy_(0, self.place_B, x_BGRK)
        x = x_BGRK.view(len(self.lengths), -1, heads, group, last).transpose(1, 2)
        return x.reshape(len(self.lengths), heads, -1, last)

    def _gather(self, x_NGSK: Tensor, group: int) -> Tensor:
        """The reverse of `_spread`, [B, G, R, K] with R = `group`."""
        nodes, heads, _, last = x_NGSK.shape
        x = x_NGSK.view(nodes, heads, -1, group, last).transpose(1, 2)
        x = x.reshape(-1, heads, group, last)
        return x if self.place_B is None else x[self.place_B]

    def scores(self, layer: int, query_BGRD: Tensor) -> Tensor:
        """Products [B, G, R, T] of the queries with the keys that they see here."""
        met = scores(self._spread(query_BGRD), self.key[layer])
        made = self._gather(met, query_BGRD.shape[2])
        return made if self.mask_B1T is None else made.add_(self.mask_B1T[:, None])

    def mix(self, layer: int, p_BGRT: Tensor) -> Tensor:
        """Values [B, G, R, D] weighted by `p_BGRT`."""
        return self._gather(self._spread(p_BGRT) @ self.value[layer], p_BGRT.shape[2])


class Own:
    """Keys and values of the answers: [rows, G, room, D], of which T columns are written."""

    def __init__(self, rows: int, room: int) -> None:
        self.rows, self.room, self.length = rows, room, 0
        self.key: list[Tensor] = []
        self.value: list[Tensor] = []

    def take(self, layer: int, key_BGD: Tensor, value_BGD: Tensor) -> None:
        """Write one token of each row."""
        if len(self.key) <= layer:
            shape = (self.rows, key_BGD.shape[1], self.room, key_BGD.shape[2])
            self.key.append(key_BGD.new_empty(shape))
            self.value.append(key_BGD.new_empty(shape))
        self.key[layer][: self.rows, :, self.length - 1] = key_BGD
        self.value[layer][: self.rows, :, self.length - 1] = value_BGD

    def keep(self, moves: Sequence[tuple[int, int]], rows: int) -> None:
        """Copy rows (from, to) and forget those from `rows` on."""
        for tensor in (*self.key, *self.value):
            for source, target in moves:
                tensor[target, :, : self.length] = tensor[source, :, : self.length]
        self.rows = rows

    def scores(self, layer: int, query_BGRD: Tensor) -> Tensor:
        """Products [B, G, R, T] of the queries with their own row's keys."""
        return scores(query_BGRD, self.key[layer][: self.rows, :, : self.length])

    def mix(self, layer: int, p_BGRT: Tensor) -> Tensor:
        """Values [B, G, R, D] weighted by `p_BGRT`."""
        return p_BGRT @ self.value[layer][: self.rows, :, : self.length]


class Bucket:
    """Neighbouring rows whose prompts are of about one length, and all that is theirs alone.

    Args:
        lengths: tokens of the prompts, less their common beginning.
        rows: for each row, its prompt among these.
        room: tokens that a row may get.
    """

    def __init__(self, lengths: Sequence[int], rows: Sequence[int], room: int) -> None:
        self.level, self.rows = Level(lengths), list(rows)
        self.own = Own(len(self.rows), max(1, room - 1))

    def seat(self, device: torch.device) -> None:
        """Say under which prompt each row stands."""
        self.level.seat(self.rows, device)

    def keep(self, rows: Sequence[int]) -> list[int]:
        """Go on with these of its rows; returns them in the order that holds from now on."""
        order = list(rows)
        # Rows behind the new end move into the places that ended ones left.
        gaps = sorted(set(range(len(order))) - set(order))
        late = [i for i in order if i >= len(order)]
        moves = list(zip(late, gaps, strict=True))
        target = dict(moves)
        order = sorted(order, key=lambda i: target.get(i, i))
        self.own.keep(moves, len(order))
        self.rows = [self.rows[i] for i in order]
        return order

    def attend(
        self,
        layer: int,
        query_BGRD: Tensor,
        key_BGD: Tensor,
        value_BGD: Tensor,
        above: Sequence[Level],
    ) -> Tensor:
        """Attention [B, G, R, D] of one new token of each row, whose key and value are stored."""
        self.own.take(layer, key_BGD, value_BGD)
        parts = [*above, self.level, self.own]
        p_BGRT = torch.cat([part.scores(layer, query_BGRD) for part in parts], 3)
        p_BGRT = torch.softmax(p_BGRT, 3, dtype=torch.float32).to(query_BGRD.dtype)
        widths = [part.key[layer].shape[2] for part in (*above, self.level)] + [self.own.length]
        mixed: Tensor | None = None
        for part, part_BGRT in zip(parts, p_BGRT.split(widths, 3), strict=True):
            one = part.mix(layer, part_BGRT)
            mixed = one if mixed is None else mixed.add_(one)
        return cast(Tensor, mixed)


def buckets(lengths: Sequence[int], rows: Sequence[int], apart: int) -> list[list[int]]:
    """Cuts rows into neighbours whose prompts are filled up to the longest of them.

    Of all ways to cut, the one with the fewest tokens that rows see, where a bucket counts `apart`
    of them. The rows of one prompt stay together.

    Args:
        lengths: tokens of each prompt.
        rows: for each row, its prompt.
    """
    last = {prompt: place for place, prompt in enumerate(rows)}
    cuts = [0]  # places where no prompt has rows on both sides
    reach = 0
    for place, prompt in enumerate(rows, 1):
        reach = max(reach, last[prompt] + 1)
        if reach == place:
            cuts.append(place)
    longest = max(lengths[p] for p in rows)
    if sum(longest - lengths[p] for p in rows) <= apart:  # a second one could not save so much
        return [list(rows)]
    peaks = [max(lengths[p] for p in rows[i:j]) for i, j in pairwise(cuts)]
    best = [(0, 0)]  # for each cut, tokens up to there and the cut before
    for j in range(1, len(cuts)):
        tops = [*accumulate(reversed(peaks[:j]), max)][::-1]  # from each earlier cut on
        seen = [best[i][0] + apart + tops[i] * (cuts[j] - cuts[i]) for i in range(j)]
        best.append(min(zip(seen, range(j))))
    made: list[list[int]] = []
    j = len(cuts) - 1
    while j:
        i = best[j][1]
        made.append(list(rows[cuts[i] : cuts[j]]))
        j = i
    return made[::-1]

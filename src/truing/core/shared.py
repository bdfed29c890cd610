"""Rows that share their beginnings: keys and values stored once, attention without padding of rows.

A prompt is computed once for all answers to it, and what all prompts begin with (a system message)
once for all of them. Every layer of the model sees one flat list of tokens; only attention knows
which row a token belongs to. Keys and values lie in levels: the common beginning (one node), the
prompts (a node each), the answers (a node each, of one length, written in place). The queries of
all rows under one node meet its keys in one matrix product; scores of the levels stand side by side
under one softmax. A row that ends gives its place to the last one. What is known of the prompts
from earlier turns (`core.past`) is taken over, and only what follows it is computed.

Shapes: B rows, N tokens or nodes, W rows of a node at most, H query heads on G key heads with
R = H / G, T tokens of a level, D head size.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from truing.core.attention import switched
from truing.core.past import Kept, reach, rescales
from truing.core.products import quick, quick_linears
from truing.core.states import Padded
from truing.core.tree import alike
from truing.errors import InputError

NAME = "truing_shared"
COMMON = 16  # tokens from which on a common beginning is worth a level of its own
PASS = 4096  # prompt tokens computed together
_fits: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


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
        x = x_BGRK.view(len(self.lengths), self.width, heads, group, last).transpose(1, 2)
        return x.reshape(len(self.lengths), heads, self.width * group, last)

    def _gather(self, x_NGSK: Tensor) -> Tensor:
        """The reverse of `_spread`."""
        nodes, heads, _, last = x_NGSK.shape
        x = x_NGSK.view(nodes, heads, self.width, -1, last).transpose(1, 2)
        x = x.reshape(nodes * self.width, heads, -1, last)
        return x if self.place_B is None else x[self.place_B]

    def scores(self, layer: int, query_BGRD: Tensor) -> Tensor:
        """Products [B, G, R, T] of the queries with the keys that they see here."""
        key_NGTD = self.key[layer]
        made = self._gather(self._spread(query_BGRD) @ key_NGTD.transpose(2, 3))
        return made if self.mask_B1T is None else made.add_(self.mask_B1T[:, None])

    def mix(self, layer: int, p_BGRT: Tensor) -> Tensor:
        """Values [B, G, R, D] weighted by `p_BGRT`."""
        return self._gather(self._spread(p_BGRT) @ self.value[layer])


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
        key_BGTD = self.key[layer][: self.rows, :, : self.length]
        return query_BGRD @ key_BGTD.transpose(2, 3)

    def mix(self, layer: int, p_BGRT: Tensor) -> Tensor:
        """Values [B, G, R, D] weighted by `p_BGRT`."""
        return p_BGRT @ self.value[layer][: self.rows, :, : self.length]


@dataclass
class Reading:
    """A pass over nodes of one depth: (node, first token, last token) in the flat list."""

    level: int
    spans: list[tuple[int, int, int]]


class Shared:
    """States of rows under shared prompts; see `states.States`."""

    def __init__(
        self,
        module: nn.Module,
        prompts: Sequence[Sequence[int]],
        rows: Sequence[int],
        room: int,
        known: Sequence[Kept | None] = (),
    ) -> None:
        self.module, self.prompts, self.rows = module, prompts, list(rows)
        self.device = next(module.parameters()).device
        cut = common_start(prompts)
        common = [[list(prompts[0][:cut])]] if cut else []
        whole = [*common, [list(p[cut:]) for p in prompts]]
        self.levels = [Level([len(p) for p in pieces]) for pieces in whole]
        self._recall(known or [None] * len(prompts), cut)
        self.pieces = [
            [p[a:] for p, a in zip(pieces, level.begun)]
            for pieces, level in zip(whole, self.levels)
        ]
        self.own = Own(len(self.rows), max(1, room - 1))
        self.next_B = [len(prompts[i]) for i in self.rows]
        self.reading: Reading | None = None
        self.linears = quick_linears(module)

    def _recall(self, known: Sequence[Kept | None], cut: int) -> None:
        """Take over what is known of the prompts' beginnings."""
        ends = reach(known, self.prompts)
        best = ends.index(max(ends))
        if cut and ends[best]:
            self.levels[0].begin(0, cast(Kept, known[best]), 0, min(cut, ends[best]))
        for node, (one, end) in enumerate(zip(known, ends, strict=True)):
            if end > cut:
                self.levels[-1].begin(node, cast(Kept, one), cut, end)

    def kept(self) -> list[Kept | None]:
        """See `States`."""
        if rescales(self.module):
            return [None] * len(self.prompts)
        *above, own = self.levels
        begin = [(level, 0) for level in above]
        return [Kept(tuple(ids), (*begin, (own, i))) for i, ids in enumerate(self.prompts)]

    def start(self) -> Tensor:
        """See `States`."""
        made: list[Tensor] = []
        for depth, pieces in enumerate(self.pieces):
            if any(pieces):  # a common beginning may be known already
                made = [self._read(depth, span) for span in _passes(pieces)]
        logits_NV = torch.cat(made)
        self._seat()
        return logits_NV[torch.tensor(self.rows, device=self.device)]

    def _read(self, depth: int, nodes: range) -> Tensor:
        """Compute nodes of one depth; logits [N, V] after their last tokens."""
        ids: list[int] = []
        positions: list[int] = []
        spans: list[tuple[int, int, int]] = []
        before = sum(level.lengths[0] for level in self.levels[:depth])
        for node in nodes:
            piece = self.pieces[depth][node]
            spans.append((node, len(ids), len(ids) + len(piece)))
            ids += piece
            first = before + self.levels[depth].begun[node]
            positions += range(first, first + len(piece))
        self.reading = Reading(depth, spans)
        ends_N = torch.tensor([stop - 1 for _, _, stop in spans], device=self.device)
        return self._forward(ids, positions, ends_N)

    def _forward(self, ids: Sequence[int], positions: Sequence[int], ends: Tensor | int) -> Tensor:
        with _attention(self.module), quick(self.linears):
            made = self.module(
                input_ids=torch.tensor([ids], device=self.device),
                position_ids=torch.tensor([positions], device=self.device),
                use_cache=False,
                logits_to_keep=ends,
                shared=self,
            )
        return cast(Tensor, made.logits)[0]

    def step(self, ids: Sequence[int]) -> Tensor:
        """See `States`."""
        self.reading = None
        self.own.length += 1
        logits_BV = self._forward(ids, self.next_B, 0)
        self.next_B = [p + 1 for p in self.next_B]
        return logits_BV

    def keep(self, rows: Sequence[int]) -> list[int]:
        """See `States`."""
        order = list(rows)
        # Rows behind the new end move into the places that ended ones left.
        gaps = sorted(set(range(len(order))) - set(order))
        late = [i for i in order if i >= len(order)]
        moves = list(zip(late, gaps, strict=True))
        target = dict(moves)
        order = sorted(order, key=lambda i: target.get(i, i))
        self.own.keep(moves, len(order))
        self.rows = [self.rows[i] for i in order]
        self.next_B = [self.next_B[i] for i in order]
        self._seat()
        return order

    def _seat(self) -> None:
        for depth, level in enumerate(self.levels):
            last = depth == len(self.levels) - 1
            level.seat(self.rows if last else [0] * len(self.rows), self.device)

    def attend(
        self, layer: int, query_1HND: Tensor, key_1GND: Tensor, value_1GND: Tensor, scale: float
    ) -> Tensor:
        """Attention of one layer, [1, N, H, D]; keys and values are stored."""
        if self.reading is not None:
            return self._attend_reading(layer, query_1HND, key_1GND, value_1GND, scale)
        heads = key_1GND.shape[1]
        self.own.take(layer, key_1GND[0].transpose(0, 1), value_1GND[0].transpose(0, 1))
        query_BHD = query_1HND[0].transpose(0, 1) * scale
        rows, many, size = query_BHD.shape
        query_BGRD = query_BHD.reshape(rows, heads, many // heads, size)
        parts = [*self.levels, self.own]
        p_BGRT = torch.cat([part.scores(layer, query_BGRD) for part in parts], 3)
        p_BGRT = torch.softmax(p_BGRT, 3, dtype=torch.float32).to(query_BGRD.dtype)
        widths = [part.key[layer].shape[2] for part in self.levels] + [self.own.length]
        mixed: Tensor | None = None
        for part, part_BGRT in zip(parts, p_BGRT.split(widths, 3), strict=True):
            one = part.mix(layer, part_BGRT)
            mixed = one if mixed is None else mixed.add_(one)
        return cast(Tensor, mixed).reshape(1, rows, many, size)

    def _attend_reading(
        self, layer: int, query_1HND: Tensor, key_1GND: Tensor, value_1GND: Tensor, scale: float
    ) -> Tensor:
        reading = cast(Reading, self.reading)
        above, level = self.levels[: reading.level], self.levels[reading.level]
        grouped = query_1HND.shape[1] != key_1GND.shape[1]
        made: list[Tensor] = []
        for node, a, b in reading.spans:
            q, k, v = query_1HND[:, :, a:b], key_1GND[:, :, a:b], value_1GND[:, :, a:b]
            level.take(layer, node, k[0], v[0])
            mask = None
            if begun := level.begun[node]:
                here = (slice(node, node + 1), slice(None), slice(begun + b - a))
                k, v = level.key[layer][here], level.value[layer][here]
            if above:
                k = torch.cat([*(u.key[layer][:1] for u in above), k], 2)
                v = torch.cat([*(u.value[layer][:1] for u in above), v], 2)
            if k.shape[2] > b - a:
                seen = torch.ones(b - a, k.shape[2], dtype=torch.bool, device=q.device)
                mask = seen.tril(k.shape[2] - (b - a))
            made.append(
                F.scaled_dot_product_attention(
                    q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
                )
            )
        return torch.cat(made, 2).transpose(1, 2)


def common_start(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that all prompts begin with, when there are enough; each keeps one of its own."""
    if len(prompts) < 2:
        return 0
    cut = alike(prompts, keep=1)
    return cut if cut >= COMMON else 0


def _passes(pieces: Sequence[Sequence[int]]) -> list[range]:
    """Neighbouring nodes that are computed together."""
    made: list[range] = []
    start, tokens = 0, 0
    for i, piece in enumerate(pieces):
        if i > start and tokens + len(piece) > PASS:
            made.append(range(start, i))
            start, tokens = i, 0
        tokens += len(piece)
    return [*made, range(start, len(pieces))]


def _interface(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    shared: Shared | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """What transformers calls in each attention layer; [1, N, H, D] and no weights."""
    odd = {n for n in ("softcap", "s_aux", "position_bias") if others.get(n) is not None}
    layer = cast("int | None", getattr(module, "layer_idx", None))
    if dropout or odd or shared is None or layer is None:
        raise InputError("this attention is not computed in shared form", seen=sorted(odd))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return shared.attend(layer, query, key, value, scale), None


@contextlib.contextmanager
def _attention(module: nn.Module) -> Generator[None]:
    AttentionInterface.register(NAME, _interface)
    with switched(module, NAME):
        yield


def fits(module: nn.Module, longest: int) -> bool:
    """Whether the architecture gives its own values in shared form, for rows of that length.

    A few tokens are computed in both ways, once for each module. Windows of attention shorter than
    the rows, recurrent layers, attention with biases or sinks and the like do not fit.
    """
    window = cast("int | None", getattr(module.config, "sliding_window", None))
    if window is not None and longest > window:
        return False
    if module not in _fits:
        _fits[module] = _compare(module)
    return _fits[module]


def _compare(module: nn.Module) -> bool:
    if not getattr(module, "_supports_attention_backend", False):
        return False
    vocab = cast(int, cast(PreTrainedModel, module).config.get_text_config().vocab_size)
    ids = [(7 * i * i + 3 * i + 5) % vocab for i in range(COMMON + 9)]
    prompts = [ids[: COMMON + 3], ids[:COMMON] + ids[-5:]]
    made: list[list[Tensor]] = []
    try:
        for states in (Padded(module, prompts, [0, 0, 1]), Shared(module, prompts, [0, 0, 1], 4)):
            logits = [states.start(), states.step(ids[:3])]
            order = states.keep([1, 2])
            logits.append(states.step([ids[4:6][k - 1] for k in order]))
            logits[-1] = logits[-1][torch.tensor(order, device=logits[-1].device).argsort()]
            made.append(logits)
    except (InputError, TypeError) as error:  # such as a forward that takes no such argument
        warnings.warn(f"{type(module).__name__} generates by the slower way: {error}", stacklevel=2)
        return False
    loose = 1e-3 if made[0][0].dtype == torch.float32 else 5e-2
    return all(
        float((a.float() - b.float()).abs().max()) <= loose * max(float(a.abs().max()), 1e-3)
        for a, b in zip(*made, strict=True)
    )

"""Rows that share their beginnings: keys and values stored once, attention without padding of rows.

A prompt is computed once for all answers to it, and what all prompts begin with (a system message)
once for all of them. Every layer of the model sees one flat list of tokens; only attention knows
which row a token belongs to. Keys and values lie in levels: the common beginning (one node), the
prompts (a node each), the answers (a node each, of one length, written in place). The queries of
all rows under one node meet its keys in one matrix product; scores of the levels stand side by side
under one softmax (`core.generation.prefix_levels`). A row that ends gives its place to the last one
of its bucket. What is known of the prompts from earlier turns (`core.generation.dialogue_cache`) is
taken over, and only what follows it is computed.

Shapes: B rows, N tokens, H query heads on G key heads with R = H / G, D head size.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from truing.core.generation.dialogue_cache import Kept, reach, rescales
from truing.core.generation.prefix_levels import APART_CPU, APART_GPU, Bucket, Level, buckets
from truing.core.generation.row_cache import Padded
from truing.core.modelfiles.reach import text_config
from truing.core.passes.attention import by_kernel, switched
from truing.core.passes.products import quick, quick_linears
from truing.core.passes.tried import Tried, kind_of
from truing.core.tree import alike
from truing.errors import InputError

NAME = "truing_shared"
COMMON = 16  # tokens from which on a common beginning is worth a level of its own
PASS = 4096  # prompt tokens computed together
READ = 1024  # of which so many meet a mask at a time on a GPU
_fits: Tried[bool] = Tried()


@dataclass
class Reading:
    """A pass over nodes: each with its first token and its end in the flat list."""

    above: Sequence[Level]
    spans: list[tuple[Level, int, int, int]]


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
        self.module, self.prompts, self.order = module, prompts, list(rows)
        self.device = next(module.parameters()).device
        cut = common_start(prompts)
        self.above = [Level([cut])] if cut else []
        apart = APART_GPU if self.device.type == "cuda" else APART_CPU
        nodes: dict[int, tuple[Level, int]] = {}
        self.buckets: list[Bucket] = []
        for part in buckets([len(p) for p in prompts], rows, apart):
            used = list(dict.fromkeys(part))
            places = {i: place for place, i in enumerate(used)}
            one = Bucket([len(prompts[i]) - cut for i in used], [places[i] for i in part], room)
            self.buckets.append(one)
            nodes |= {i: (one.level, place) for i, place in places.items()}
        self.nodes = [nodes[i] for i in range(len(prompts))]
        self._recall(known or [None] * len(prompts), cut)
        self.next_B = [len(prompts[i]) for i in rows]
        self.reading: Reading | None = None
        self.linears = quick_linears(module)

    def _recall(self, known: Sequence[Kept | None], cut: int) -> None:
        """Take over what is known of the prompts' beginnings."""
        ends = reach(known, self.prompts)
        best = ends.index(max(ends))
        if cut and ends[best]:
            self.above[0].begin(0, cast(Kept, known[best]), 0, min(cut, ends[best]))
        for (level, node), one, end in zip(self.nodes, known, ends, strict=True):
            if end > cut:
                level.begin(node, cast(Kept, one), cut, end)

    def kept(self) -> list[Kept | None]:
        """See `States`."""
        if rescales(self.module):
            return [None] * len(self.prompts)
        begin = [(level, 0) for level in self.above]
        return [Kept(tuple(p), (*begin, n)) for p, n in zip(self.prompts, self.nodes, strict=True)]

    def start(self) -> Tensor:
        """See `States`."""
        before = 0
        for level in self.above:
            if level.begun[0] < level.lengths[0]:  # it may be known already
                self._read([self.prompts[0]], [(level, 0)], before)
            before += level.lengths[0]
        fresh = [
            n - before - level.begun[i] for n, (level, i) in zip(map(len, self.prompts), self.nodes)
        ]
        made = [
            self._read([self.prompts[i] for i in span], [self.nodes[i] for i in span], before)
            for span in _passes(fresh)
        ]
        self._seat()
        return torch.cat(made)[torch.tensor(self.order, device=self.device)]

    def _read(
        self, prompts: Sequence[Sequence[int]], nodes: Sequence[tuple[Level, int]], before: int
    ) -> Tensor:
        """Compute a node of each prompt, from token `before` on; logits [N, V] after their last."""
        ids: list[int] = []
        positions: list[int] = []
        spans: list[tuple[Level, int, int, int]] = []
        for prompt, (level, node) in zip(prompts, nodes, strict=True):
            places = range(before + level.begun[node], before + level.lengths[node])
            spans.append((level, node, len(ids), len(ids) + len(places)))
            ids += prompt[places.start : places.stop]
            positions += places
        above = [level for level in self.above if level is not nodes[0][0]]
        self.reading = Reading(above, spans)
        ends_N = torch.tensor([stop - 1 for *_, stop in spans], device=self.device)
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
        for bucket in self.buckets:
            bucket.own.length += 1
        logits_BV = self._forward(ids, self.next_B, 0)
        self.next_B = [p + 1 for p in self.next_B]
        return logits_BV

    def keep(self, rows: Sequence[int]) -> list[int]:
        """See `States`."""
        order: list[int] = []
        first = 0
        for bucket in self.buckets:
            end = first + len(bucket.rows)
            order += [first + i for i in bucket.keep([r - first for r in rows if first <= r < end])]
            first = end
        self.buckets = [b for b in self.buckets if b.rows]
        self.next_B = [self.next_B[i] for i in order]
        self._seat()
        return order

    def _seat(self) -> None:
        for bucket in self.buckets:
            bucket.seat(self.device)

    def attend(
        self, layer: int, query_1HND: Tensor, key_1GND: Tensor, value_1GND: Tensor, scale: float
    ) -> Tensor:
        """Attention of one layer, [1, N, H, D]; keys and values are stored."""
        if self.reading is not None:
            return self._attend_reading(layer, query_1HND, key_1GND, value_1GND, scale)
        query_BHD = query_1HND[0].transpose(0, 1) * scale
        rows, many, size = query_BHD.shape
        heads = key_1GND.shape[1]
        query_BGRD = query_BHD.reshape(rows, heads, many // heads, size)
        sizes = [len(bucket.rows) for bucket in self.buckets]
        new = (query_BGRD, key_1GND[0].transpose(0, 1), value_1GND[0].transpose(0, 1))
        made = [
            bucket.attend(layer, *own, self.above)
            for bucket, *own in zip(self.buckets, *(x.split(sizes) for x in new), strict=True)
        ]
        whole = made[0] if len(made) == 1 else torch.cat(made)
        return whole.reshape(1, rows, many, size)

    def _attend_reading(
        self, layer: int, query_1HND: Tensor, key_1GND: Tensor, value_1GND: Tensor, scale: float
    ) -> Tensor:
        reading = cast(Reading, self.reading)
        above = reading.above
        made: list[Tensor] = []
        for level, node, a, b in reading.spans:
            q, k, v = query_1HND[:, :, a:b], key_1GND[:, :, a:b], value_1GND[:, :, a:b]
            level.take(layer, node, k[0], v[0])
            if begun := level.begun[node]:
                here = (slice(node, node + 1), slice(None), slice(begun + b - a))
                k, v = level.key[layer][here], level.value[layer][here]
            if above:
                k = torch.cat([*(u.key[layer][:1] for u in above), k], 2)
                v = torch.cat([*(u.value[layer][:1] for u in above), v], 2)
            if k.shape[2] > b - a:
                made += _masked(q, k, v, scale)
            else:
                made.append(by_kernel(q, k, v, None, scale))
        return torch.cat(made, 2).transpose(1, 2)


def _masked(q_1HND: Tensor, k_1GTD: Tensor, v_1GTD: Tensor, scale: float) -> Iterator[Tensor]:
    """Attention of the last N tokens to all of T, [1, H, N, D] in pieces.

    A GPU holds their masks once for each head that shares keys.
    """
    tokens, before = q_1HND.shape[2], k_1GTD.shape[2] - q_1HND.shape[2]
    step = READ if q_1HND.is_cuda else tokens
    for a in range(0, tokens, step):
        part = q_1HND[:, :, a : a + step]
        end = before + a + part.shape[2]
        seen = torch.ones(part.shape[2], end, dtype=torch.bool, device=part.device)
        mask = seen.tril(before + a)
        yield by_kernel(part, k_1GTD[:, :, :end], v_1GTD[:, :, :end], mask, scale)


def common_start(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that all prompts begin with, when there are enough; each keeps one of its own."""
    if len(prompts) < 2:
        return 0
    cut = alike(prompts, keep=1)
    return cut if cut >= COMMON else 0


def _passes(lengths: Sequence[int]) -> list[range]:
    """Neighbouring prompts that are computed together."""
    made: list[range] = []
    start, tokens = 0, 0
    for i, length in enumerate(lengths):
        if i > start and tokens + length > PASS:
            made.append(range(start, i))
            start, tokens = i, 0
        tokens += length
    return [*made, range(start, len(lengths))]


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

    A few tokens are computed in both ways, once (see `tried`). Windows of attention shorter than
    the rows, recurrent layers, attention with biases or sinks and the like do not fit.
    """
    window = cast("int | None", getattr(text_config(module), "sliding_window", None))
    if window is not None and longest > window:
        return False
    return _fits(module, partial(kind_of, module), partial(_compare, module))


def _compare(module: nn.Module) -> bool:
    if not getattr(module, "_supports_attention_backend", False):
        return False
    vocab = cast(int, text_config(module).vocab_size)
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
        return _slower(module, str(error))
    loose = 1e-3 if made[0][0].dtype == torch.float32 else 5e-2
    for a, b in zip(*made, strict=True):
        apart, most = float((a.float() - b.float()).abs().max()), float(a.abs().max())
        if apart > loose * max(most, 1e-3):
            return _slower(module, f"its logits of up to {most:.3g} are off by {apart:.2g}")
    return True


def _slower(module: nn.Module, why: str) -> bool:
    warnings.warn(f"{type(module).__name__} generates by the slower way: {why}", stacklevel=2)
    return False

"""Keys and values of conversations between their turns, so that a turn only reads what is new.

A conversation grows: what a model made of one turn's prompt serves the next one as far as both
begin with the same tokens, and where a template writes earlier turns anew, up to there. What was
answered is read with the reply to it, in one pass, instead of kept as it was written token by
token. So what is kept follows from the prompts alone, and a run that was killed makes the same bits
of them (`Memory.again`) without drawing or asking anything again.

Answers are those without it but for rounding (log-probabilities to about 1e-5), as in any other
batch. Dialogues of 1,500 tokens in the end, 200 new ones and 16 drawn at each turn, on one thread
of a busy 2-core AMD EPYC: SmolLM2-135M takes 31 instead of 80 CPU seconds for 4 of them with 6
turns, and 6 instead of 24 for the last turn; the tiny model, 16 with 8 turns, 4 instead of 12.

Kept tensors are views into those of `core.generation.prefix_cache`; architectures that it does not
fit, and position codes that change with a row's length, keep nothing and compute all of it at each
turn.

Shapes: G key heads, T tokens, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from truing.core.modelfiles.reach import rope_kinds, text_config

if TYPE_CHECKING:
    from truing.core.generation.prefix_cache import Level

T = TypeVar("T")
SHARE = 0.25  # of the memory that is free when a rollout begins
UNKNOWN = 2**30  # bytes, where the system does not say what is free
UNBOUND = 2**63


@dataclass(frozen=True)
class Kept:
    """Keys and values of the tokens `ids`, in nodes that follow one another."""

    ids: tuple[int, ...]
    parts: tuple[tuple[Level, int], ...]

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.parts[0][0].key)

    def alike(self, prompt: Sequence[int]) -> int:
        """Tokens that it and the prompt begin with alike."""
        own = self.ids[: len(prompt)]
        if own == tuple(prompt[: len(own)]):
            return len(own)
        return next(i for i, (a, b) in enumerate(zip(own, prompt)) if a != b)

    def read(self, layer: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Keys and values [G, T, D] of the tokens from `start` to `stop`."""
        keys: list[Tensor] = []
        values: list[Tensor] = []
        at = 0
        for level, node in self.parts:
            a, b = max(start - at, 0), min(stop - at, level.lengths[node])
            if a < b:
                keys.append(level.key[layer][node, :, a:b])
                values.append(level.value[layer][node, :, a:b])
            at += level.lengths[node]
        return torch.cat(keys, 1), torch.cat(values, 1)


def held(rows: Iterable[Kept | None]) -> int:
    """Bytes that rows hold, those of others that fill up a node's tensor included."""
    levels = {id(v): v for kept in rows if kept is not None for v, _ in kept.parts}
    return sum(t.nbytes for v in levels.values() for t in (*v.key, *v.value))


def reach(known: Sequence[Kept | None], prompts: Sequence[Sequence[int]]) -> list[int]:
    """How many tokens of each prompt are known; its last one never is, for it gives logits."""
    return [
        min(one.alike(prompt), len(prompt) - 1) if one is not None else 0
        for one, prompt in zip(known, prompts, strict=True)
    ]


def rescales(module: nn.Module) -> bool:
    """True where a row that grows gives its first tokens other position codes."""
    kinds = rope_kinds(text_config(module))
    return any(k.get("rope_type") in ("dynamic", "longrope") for k in kinds)


@dataclass
class Past:
    """What is known of each prompt of a request, before it and, once it is answered, after it.

    Args:
        rows: one for each prompt; None where nothing is known.
        draw: False reads the prompts only, as they were read for answers that are there already.
        limit: bytes of `rows` and `beside` together; what a wave would bring beyond is not kept.
        beside: what is kept of rows that the request does not ask.
    """

    rows: list[Kept | None]
    draw: bool = True
    limit: int = UNBOUND
    beside: Sequence[Kept] = ()

    def take(self, at: Sequence[int], kept: Sequence[Kept | None]) -> None:
        """Put what is known now of the prompts `at`, a wave; nothing where it has no room."""
        for i, one in zip(at, kept, strict=True):
            self.rows[i] = one
        if held((*self.rows, *self.beside)) > self.limit:
            for i in at:
                self.rows[i] = None


class Memory:
    """What is known of rows between requests, by their names.

    Names are no more than hints where to look: how far a row serves a prompt, its tokens say.

    Args:
        limit: bytes; what a wave of a request would bring beyond it is not kept, not even until
            the request ends. 0 keeps nothing.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._kept: dict[Hashable, Kept] = {}
        self._later: list[Callable[[], object]] = []

    @property
    def size(self) -> int:
        """Bytes that are held; see `held`."""
        return held(self._kept.values())

    def only(self, names: Iterable[Hashable]) -> None:
        """Drop all rows but these."""
        live = set(names)

        def drop() -> None:
            self._kept = {n: kept for n, kept in self._kept.items() if n in live}

        if self._later:
            self._later.append(drop)
        else:
            drop()

    def ask(self, request: Callable[[Past | None], T], names: Sequence[Sequence[Hashable]]) -> T:
        """What a request gives that is told what is known of its prompts.

        Args:
            request: is given None where nothing is to be kept.
            names: of the rows that go on from each prompt.
        """
        if not self.limit:
            return request(None)
        for act in self._later:
            act()
        self._later.clear()
        return self._ask(request, names, draw=True)

    def again(
        self, request: Callable[[Past | None], object], names: Sequence[Sequence[Hashable]]
    ) -> None:
        """Take note of a request whose answers are there already; it is read when one is not."""
        if self.limit:
            self._later.append(lambda: self._ask(request, names, draw=False))

    def _ask(
        self, request: Callable[[Past | None], T], names: Sequence[Sequence[Hashable]], draw: bool
    ) -> T:
        rows = [self._kept.get(some[0]) for some in names]
        for some in names:  # from here on the request alone holds them, so that it can let go
            for name in some:
                self._kept.pop(name, None)
        past = Past(rows, draw, self.limit, list(self._kept.values()))
        made = request(past)
        for some, kept in zip(names, past.rows, strict=True):
            if kept is not None:
                self._kept |= dict.fromkeys(some, kept)
        return made


def room() -> int:
    """Bytes for what this process keeps between turns: a share of the memory that is free now."""
    if torch.cuda.is_available():
        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return int(SHARE * (torch.cuda.mem_get_info()[0] + unused))
    from truing.core.trainer import distributed
    from truing.doctor import memory_gib

    free = int(SHARE * memory_gib()[1] * 2**30) or UNKNOWN
    return free // distributed.now().size

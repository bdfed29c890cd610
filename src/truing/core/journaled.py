"""Many items made some at a time, of which a stopped step keeps what was finished."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from truing.context import Json, current
from truing.core.trainer import distributed
from truing.tables import content_hash

Vectors = NDArray[np.float32]
T = TypeVar("T")
V = TypeVar("V")


def kept(
    name: str, facts: object, items: Sequence[T], size: int, make: Callable[[Sequence[T]], list[V]]
) -> list[V]:
    """What `make` says of each item; what a stopped step had finished is read from its journal.

    Args:
        name: of the journal, and of what is made, for the progress.
        facts: all that it depends on beside the items.
        size: items that are made at once, which a kill can cost.
    """
    return [v for values in _chunks(name, facts, items, size, make) for v in values]


def _chunks(
    name: str, facts: object, items: Sequence[T], size: int, make: Callable[[Sequence[T]], list[V]]
) -> Iterator[list[V]]:
    """What `make` says of each chunk, which is the same whether or not a journal keeps it.

    Plain calls have nothing to go on from, and of several processes each would write into it.
    """
    context, label = current(), f"rows ({name})"
    if not context.stored or distributed.now().size > 1:
        for start in range(0, len(items), size):
            yield make(items[start : start + size])
            if len(items) > size:  # a single chunk is too quick to be told
                context.progress(min(start + size, len(items)), len(items), label)
        return

    def key(_: int, chunk: Sequence[T]) -> str:
        return content_hash([facts, list(chunk)])

    def made(_: int, chunk: Sequence[T]) -> Json:
        return cast(Json, make(chunk))

    for _, values in context.chunks(name, items, size, key, made, label):
        yield cast("list[V]", values)


def kept_vectors(
    name: str, facts: object, items: Sequence[T], size: int, make: Callable[[Sequence[T]], Vectors]
) -> Vectors:
    """Vectors [N, D] as `make` gives them, in float32, journaled as text of their bytes."""

    def made(chunk: Sequence[T]) -> list[str]:
        vectors_ND = np.ascontiguousarray(make(chunk), np.float32)
        return [base64.b64encode(v.tobytes()).decode("ascii") for v in vectors_ND]

    found = _chunks(f"vectors-{name}", facts, items, size, made)
    return np.concatenate(
        [
            np.stack([np.frombuffer(base64.b64decode(v), np.float32) for v in texts])
            for texts in found
        ]
    )

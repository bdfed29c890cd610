"""Many items made some at a time, of which a stopped step keeps what was finished."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from typing import TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from truing.context import Json, current
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

    def key(_: int, chunk: Sequence[T]) -> str:
        return content_hash([facts, list(chunk)])

    def made(_: int, chunk: Sequence[T]) -> Json:
        return cast(Json, make(chunk))

    found = current().chunks(name, items, size, key, made, f"rows ({name})")
    return [v for _, values in found for v in cast("list[V]", values)]


def kept_vectors(
    name: str, facts: object, items: Sequence[T], size: int, make: Callable[[Sequence[T]], Vectors]
) -> Vectors:
    """Vectors [N, D] as `make` gives them, in float32, journaled as text of their bytes."""

    def made(chunk: Sequence[T]) -> list[str]:
        vectors_ND = np.ascontiguousarray(make(chunk), np.float32)
        return [base64.b64encode(v.tobytes()).decode("ascii") for v in vectors_ND]

    texts = kept(f"vectors-{name}", facts, items, size, made)
    return np.stack([np.frombuffer(base64.b64decode(v), np.float32) for v in texts])

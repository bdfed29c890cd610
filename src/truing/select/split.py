"""Split a table into a training and a held-out part that share no text and no near-duplicate.

Rows are ordered by the hash of their own content and the salt, so that the split depends neither
on the order of the rows nor on the process; the first `held_out` rows are the held-out part. A
training row whose sentence vector is within `threshold` (squared distance) of a held-out row goes
to neither part: a model must not be tested on what it was trained on in other words. Our own; no
paper.
"""

from __future__ import annotations

from typing import Literal

from truing.errors import InputError
from truing.method import method
from truing.select.near_duplicates import row_text, text_vectors
from truing.tables import Row, Table, content_hash


def order(rows: list[Row], salt: int) -> list[int]:
    """Places of the rows in an order that only their texts and `salt` decide."""
    keys = [content_hash([salt, row_text(r)], 16) for r in rows]
    return sorted(range(len(rows)), key=keys.__getitem__)


@method()
def split(
    data: Table,
    *,
    part: Literal["train", "held_out"],
    held_out: int,
    threshold: float = 0.3,
    salt: int = 0,
) -> Table:
    """Split a table into a training and a held-out part that share no near-duplicate.

    Args:
        part: which of the two parts to return; two steps with the same settings fit together.
        held_out: number of rows of the held-out part.
        threshold: squared distance of unit sentence vectors (cosine 0.85 is 0.3) below which a
            training row is left out; 0 compares exact texts.
        salt: another number gives another split.
    """
    if not 0 < held_out < len(data):
        raise InputError(
            "the held-out part must be smaller than the table",
            where="select/split setting 'held_out'",
            seen=f"{held_out} of {len(data)} rows",
            fix="Synthesize more rows, or hold out fewer",
        )
    places = order(data.rows, salt)
    test, train = places[:held_out], places[held_out:]
    if part == "held_out":
        return data.take(test).with_lineage(filter="held out")
    texts = [row_text(data.rows[i]) for i in places]
    vectors = text_vectors(texts, "" if threshold > 0 else "exact")
    nearest = (vectors[held_out:] @ vectors[:held_out].T).max(axis=1)
    far = 1.0 - threshold / 2.0 if threshold > 0 else 1.0
    kept = [i for i, c in zip(train, nearest, strict=True) if c < far]
    if not kept:
        raise InputError("no training row is left", where="select/split", seen=len(train))
    return data.take(kept).with_lineage(filter="train")

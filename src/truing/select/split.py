"""Split a table into a training and a held-out part that share no text and no near-duplicate.

Rows are ordered by the hash of their own content and the salt, so that the split depends neither
on the order of the rows nor on the process; the first `held_out` rows are the held-out part. A
training row whose sentence vector is within `threshold` (squared distance) of a held-out row goes
to neither part: a model must not be tested on what it was trained on in other words. Of a dialogue
all that is asked counts, as in select/near_duplicates. Rows without texts, such as images, are told
apart by their ids alone. Our own; no paper.
"""

from __future__ import annotations

from typing import Literal

from truing.core.embed import embedded, nearest
from truing.errors import InputError
from truing.method import method
from truing.select.near_duplicates import asked_text, known, row_name
from truing.tables import Row, Table, content_hash


def order(rows: list[Row], salt: int) -> list[int]:
    """Places of the rows in an order that only what they hold and `salt` decide."""
    keys = [content_hash([salt, row_name(r)], 16) for r in rows]
    return sorted(range(len(rows)), key=keys.__getitem__)


def _apart(texts: list[str], held_out: int, threshold: float) -> list[int]:
    """Numbers of the texts after the first `held_out` that are like none of those."""
    later = range(held_out, len(texts))
    if not any(texts):  # images and the like, of which no two are the same row
        return list(later)
    if threshold == 0:
        held = {known(t) for t in texts[:held_out]}
        return [i for i in later if known(texts[i]) not in held]
    vectors_ND = embedded(texts)
    _, distance_M1 = nearest(vectors_ND[held_out:], vectors_ND[:held_out])
    return [i for i, d in zip(later, distance_M1[:, 0], strict=True) if d > threshold]


@method(
    within={"held_out": (1, None), "threshold": (0, 4), "salt": "(-inf, inf)"},
    makes="data",
)
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
    if part == "held_out":
        return data.take(places[:held_out]).with_lineage(filter="held out")
    kept = _apart([asked_text(data.rows[i]) for i in places], held_out, threshold)
    train = [places[i] for i in kept]
    if not train:
        raise InputError(
            "no training row is left",
            where="select/split",
            seen=len(places) - held_out,
            fix="Lower held_out, or threshold: the others are too like the held-out rows",
        )
    return data.take(train).with_lineage(filter="train")

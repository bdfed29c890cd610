"""Columns of probabilities or weights: the row with another number is named before training."""

from __future__ import annotations

from pathlib import Path

import pytest

from truing.context import Context, use
from truing.errors import InputError
from truing.method import methods
from truing.models import Model
from truing.tables import Row, Table

ASKED: Row = {"prompt": "say oak"}
PAIR: Row = {**ASKED, "chosen": "oak", "rejected": "no"}
SAID: Row = {**ASKED, "completion": "oak"}


@pytest.mark.parametrize(
    ("name", "kind", "row", "column", "good", "bad"),
    [
        ("sppo", "pair", PAIR, "win_chosen", 0.7, 70.0),
        ("sppo", "pair", PAIR, "win_rejected", 0.0, -0.25),
        ("bco", "unpaired", SAID | {"label": False}, "prompt_is_good", 1.0, 1.5),
        ("mixture_of_instructions", "example", SAID, "weight", 0.0, -2.0),
        ("weak_to_strong", "judgement", SAID, "score", 1.0, 2.0),
        ("weak_to_strong_confidence", "judgement", SAID, "score", 0.5, -1.0),
    ],
)
def test_the_row_is_named_before_anything_is_trained(
    name: str, kind: str, row: Row, column: str, good: float, bad: float,
    tiny_path: Path, tmp_path: Path,
) -> None:  # fmt: skip
    rows = [row | {column: good}, row | {column: bad}, row]
    data = Table(kind, rows if kind != "judgement" else rows[:2])
    with use(Context(folder=tmp_path)) as context, pytest.raises(InputError) as error:
        methods[name](Model.open(tiny_path), data, steps=1, batch=1, rank=2)
    assert error.value.where == f"column {column!r} table row 2" and error.value.seen == bad
    assert "[0, 1]" in error.value.message or "not negative" in error.value.message
    assert not any("loss" in m for m in context.metrics)

"""How many rows carry a column that they may go without is said, and a misspelt one is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from truing.context import Context, use
from truing.method import methods
from truing.models import Model
from truing.tables import Row, Table

PAIR: Row = {"prompt": "a", "chosen": "b", "rejected": "c"}


def trained(name: str, path: Path, folder: Path, *more: Row) -> dict[str, object]:
    """What is recorded of the rows before training on pairs with these columns besides."""
    table = Table("pair", [PAIR | {"prompt": f"p{i}"} | row for i, row in enumerate(more)])
    with use(Context(folder=folder)) as context:
        methods[name](Model.open(path), table, steps=1, batch=2, rank=2)
    return next(m for m in context.metrics if "rows" in m)


def test_each_is_counted_and_a_misspelt_one_named(
    tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = trained("bradley_terry", tiny_path, tmp_path / "a", {"margin": 1.0}, {})
    assert found["rows"] == 2 and found["with_margin"] == 1
    said = capsys.readouterr().err
    assert "with_margin: 1" in said and "warning" not in said
    rows: list[Row] = [{"chosen_score": 1.0, "scores_rejected": 0.0}] * 2
    found = trained("absolute_scores", tiny_path, tmp_path / "b", *rows)
    assert (found["with_score_chosen"], found["with_score_rejected"]) == (0, 0)
    said = capsys.readouterr().err
    assert "absolute_scores: warning: no row has the column 'score_rejected'" in said
    assert "rename 'scores_rejected' if that is meant" in said
    assert "column 'score_chosen', which a row may go without; rename 'chosen_score'" in said
    assert "with_" not in str(trained("dpo", tiny_path, tmp_path / "c", {}, {}))

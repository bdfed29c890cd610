"""One table for one process reward model: values made binary, pairs as right and wrong."""

from __future__ import annotations

import pytest

from truing.context import Context, use
from truing.errors import InputError
from truing.synthesize.unified_labels import unified_labels
from truing.tables import Table

STEPS = Table(
    "steps",
    [{"prompt": "p", "steps": ["a", "b", "c"], "labels": [0.2, 0.85, 1.7], "separator": "\n",
      "lineage": {"label": "value"}}],
)  # fmt: skip
PAIRS = Table("pair", [{"prompt": [{"role": "user", "content": "q"}], "chosen": "x y",
                        "rejected": "z"}])  # fmt: skip


def test_by_hand() -> None:
    with use(Context()) as context:
        found = unified_labels({"sums": STEPS, "liked": PAIRS})
        assert context.metrics[0] == {"rows": 3, "right": 3 / 5, "steps_sums": 3, "steps_liked": 2}
    assert found.kind == "steps"
    assert [(r["steps"], r["labels"]) for r in found] == [
        (["a", "b", "c"], [0.0, 1.0, 1.0]), (["x y"], [1.0]), (["z"], [0.0]),
    ]  # fmt: skip
    assert [r["objective"] for r in found] == ["sums", "liked", "liked"]
    assert [r["separator"] for r in found] == ["\n", "\n\n", "\n\n"]
    assert found.rows[1]["prompt"] == PAIRS.rows[0]["prompt"]
    lineage = found.rows[0]["lineage"]
    assert lineage == {"label": "value", "parents": [STEPS.rows[0]["id"]]}
    assert len({r["id"] for r in found}) == 3
    assert unified_labels({"sums": STEPS}, threshold=0.1).rows[0]["labels"] == [1.0] * 3


def test_faults_are_named() -> None:
    def steps(labels: list[object]) -> Table:
        return Table("steps", [{"prompt": "p", "steps": ["a", "b"], "labels": labels}])

    for tables, match in (
        ({}, "no table"),
        ({"one": steps([1.0])}, r"'one'.*row 1.*one number for each step"),
        ({"one": steps([1.0, float("nan")])}, r"'one'.*row 1.*not a finite number"),
        ({"one": Table("prompt", [{"prompt": "p"}])}, "'one'.*rows of kind steps or pair"),
    ):
        with pytest.raises(InputError, match=match):
            unified_labels(tables)

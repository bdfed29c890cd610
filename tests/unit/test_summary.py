"""What the terminal says of a run claims no more than the reports know."""

from __future__ import annotations

import pytest

from truing.reports import Measure, Report
from truing.summary import table_of


@pytest.mark.parametrize(("n", "said"), [(1, "1 prompt"), (64, "64 prompts")])
def test_prompts_are_not_called_held_out(n: int, said: str) -> None:
    sides = [
        Measure(f"violation rate {when}", value, value, value, n, "share", "brief", "lower")
        for when, value in (("before", 0.75), ("after", 0.25))
    ]
    report = Report("before and after", sides, None, {"kind": "before_after"})
    lines = table_of([report]).splitlines()
    assert lines[2].split() == ["violations,", "brief", "0.75", "0.25"]
    assert lines[-1] == said  # whether anything was trained on them, no report says

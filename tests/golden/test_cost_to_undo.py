"""The curve and the number by hand, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from truing.context import Context, use
from truing.errors import InputError
from truing.method import methods
from truing.reports import Measure, Report

# By budget: refusal rate, nats per token.
FOUND = {
    "before": (0.8, 2.0),
    "a": (0.06, 2.2),  # undone, but exp(-0.2) = 0.82 of the ability
    "b": (0.5, 2.01),  # not undone
    "c": (0.08, 2.04),  # 0.08 = 0.1 x 0.8, exp(-0.04) = 0.961
    "d": (0.0, 2.01),
}
COSTS = {"a": 10.0, "b": 20.0, "c": 40.0, "d": 80.0}


def reports(name: str, at: int) -> dict[str, Report]:
    return {
        key: Report(name, [Measure(name, v[at], v[at] - 0.05, v[at] + 0.05, 48, "share", "", "")])
        for key, v in FOUND.items()
    }


def made(tmp_path: Path, costs: dict[str, float], **more: object) -> Report:
    with use(Context(folder=tmp_path)):
        report = methods["cost_to_undo"](
            reports("refusal rate", 0), reports("ability", 1), costs=costs, **more
        )
    assert isinstance(report, Report)
    return report


def test_by_hand(tmp_path: Path) -> None:
    report = made(tmp_path, COSTS)
    assert report.get("cost to undo").value == 40 and report.meta["cost_to_undo"] == 40
    kept = {m.category: m.value for m in report if m.name == "ability kept"}
    assert kept["cost 10"] == pytest.approx(math.exp(-0.2)) and kept["cost 0"] == 1
    rates = {m.category: m.value for m in report if m.name == "refusal rate"}
    assert rates == {"cost 0": 0.8, "cost 10": 0.06, "cost 20": 0.5, "cost 40": 0.08, "cost 80": 0}
    assert made(tmp_path, COSTS, kept=0.8).get("cost to undo").value == 10
    assert made(tmp_path, COSTS, left=0.0).get("cost to undo").value == 80
    none = made(tmp_path, COSTS, left=0.0, kept=1.0)
    assert none.meta["verdict"] == "not within 80" and report.meta["notes"] == []
    assert none.meta["notes"] == ["not within 80 rows times passes"]
    assert all(m.name != "cost to undo" for m in none)


@pytest.mark.parametrize(
    ("costs", "told"),
    [
        ({**COSTS, "e": 1.0}, "unknown budget 'e'"),
        ({**COSTS, "a": 0.0}, "above 0"),
        ({"a": 10.0}, "a budget without its cost"),
    ],
)
def test_what_is_refused(tmp_path: Path, costs: dict[str, float], told: str) -> None:
    with pytest.raises(InputError, match=told):
        made(tmp_path, costs)
    with (
        use(Context(folder=tmp_path)),
        pytest.raises(InputError, match="refused nothing before"),
    ):
        never = {n: Report("r", [Measure("refusal rate", 0.0, 0, 0, 9, "share", "", "")])
                 for n in FOUND}  # fmt: skip
        methods["cost_to_undo"](never, reports("ability", 1), costs=COSTS)
    with (
        use(Context(folder=tmp_path)),
        pytest.raises(InputError, match="ability"),
    ):
        methods["cost_to_undo"](reports("refusal rate", 0), reports("refusal rate", 0), costs=COSTS)

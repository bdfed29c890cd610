"""Comparisons: contenders, budgets, and a whole one on the tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from truing import tablefiles
from truing.compare import _cost, budget_of, compare, contender, named, plan_of
from truing.core.reference import Reference
from truing.errors import InputError
from truing.method import methods

ROWS = [
    {"prompt": f"Say {i}.", "chosen": f"It is {i}", "rejected": f"No, not {i} at all"}
    for i in range(24)
]


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    return path


def test_contenders() -> None:
    one = contender("dpo@beta=0.3@schedule=linear", "train")
    assert (one.method, one.settings) == ("train/dpo", {"beta": 0.3, "schedule": "linear"})
    assert one.label == "dpo_beta_0.3_schedule_linear"
    assert contender("dpo@lr=1e-4", "train", {"lr": 1e-3, "beta": 1}).settings == {
        "lr": 1e-4,
        "beta": 1,
    }
    assert contender("steer/mean_difference", "train").method == "steer/mean_difference"
    with pytest.raises(InputError, match="setting=value"):
        contender("dpo@beta", "train")
    with pytest.raises(InputError, match="return a model"):
        contender("select/deita", "train")


def test_a_group_stands_for_all_its_methods() -> None:
    assert named("dpo@beta=0.3", "train") == ["dpo@beta=0.3"]
    assert named("no_such_thing", "train") == ["no_such_thing"]
    found = named("preference", "train")
    assert {"dpo", "kto", "simpo", "orpo", "d2o"} < set(found) and "grpo" not in found
    # All of them can be trained on pairs alone.
    plan = plan_of([contender(n, "train") for n in found], "m", "d", 4, 1, held_out=4)
    assert len([s for s in plan.steps if s.endswith("-gain")]) == len(found) + 1
    assert all(methods[f"train/{n}"].group == "preference" for n in found)


def test_budgets() -> None:
    assert [budget_of(t) for t in ("64pairs", "7", "12 rows")] == [64, 7, 12]
    with pytest.raises(InputError, match="number of rows"):
        budget_of("many")


def test_seconds_are_positive_and_skewed() -> None:
    found = _cost("dpo", [2.0, 2.0, 16.0])  # logarithms to base 2: 1, 1, 4
    half = 4.302652729911275  # Student's t at 2 degrees; sd and root n are both root 3
    assert found.value == pytest.approx(4.0)
    assert (found.lo, found.hi) == pytest.approx((2 ** (2 - half), 2 ** (2 + half)))
    assert 0 < found.lo  # the plain interval reaches from -13.4 to 26.7
    one = _cost("dpo", [0.0])
    assert (one.value, one.lo, one.hi) == pytest.approx((0.01, 0.01, 0.01))


def test_a_method_that_needs_more_is_refused() -> None:
    with pytest.raises(InputError, match="cannot give"):
        plan_of([contender("merge/ties", "train")], "m", "d", 4, 1, held_out=4)


def test_methods_share_rows_and_one_reference_pass(
    tiny_path: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[int] = []
    original = Reference.sweep

    def counted(self: Reference, *args: object) -> None:
        original(self, *args)  # type: ignore[arg-type]
        computed.append(self.computed)

    monkeypatch.setattr(Reference, "sweep", counted)
    read: list[Path] = []
    lines = tablefiles._json_lines
    monkeypatch.setattr(tablefiles, "_json_lines", lambda p: read.append(p) or lines(p))
    found = compare(
        ["dpo@steps=1", "ipo@steps=1", "simpo@steps=1"],
        model=str(tiny_path),
        data=str(pairs),
        budget="8pairs",
        seeds=2,
        held_out=8,
        runs=tmp_path / "runs",
    )
    # Two seeds draw two samples; the second objective finds the first one's reference values.
    assert computed == [1, 0, 1, 0]
    assert read.count(pairs) == 1
    assert [m.category for m in found.report if m.name == "gain"] == [
        "dpo_steps_1",
        "ipo_steps_1",
        "simpo_steps_1",
    ]
    line = found.line()
    assert line["seeds"] == 2
    assert "simpo_steps_1" in found.table()
    assert Path(str(line["report"])).is_file()
    rows = {s: n.key for s, n in found.result.results.items() if s.startswith("rows-")}
    assert rows["rows-0"] != rows["rows-1"]
    base = found.report.meta["base"]
    gain = found.report.get("gain", "dpo_steps_1")
    assert isinstance(base, dict)
    after = [
        found.result.results[f"dpo_steps_1-{s}-gain"].get("preference").value  # type: ignore
        for s in (0, 1)
    ]
    assert gain.value == pytest.approx(sum(after) / 2 - float(str(base["preference"])))

"""What the terminal says of a run claims no more than the reports know."""

from __future__ import annotations

import pytest

from truing.output import width
from truing.reports import Measure, Report
from truing.summary import about, rows_text, summary_of, table_of


@pytest.mark.parametrize(("n", "said"), [(1, "1 prompt"), (64, "64 prompts")])
def test_prompts_are_not_called_held_out(n: int, said: str) -> None:
    sides = [
        Measure(f"violation rate {when}", value, value, value, n, "share", "brief", "lower")
        for when, value in (("before", 0.75), ("after", 0.25))
    ]
    report = Report("before and after", sides, None, {"kind": "before_after"})
    lines = table_of({"result": report}).splitlines()
    assert lines[2].split() == ["violations,", "brief", "0.75", "0.25"]
    assert lines[-1] == said  # whether anything was trained on them, no report says
    both = table_of({"one": report, "other": report}).splitlines()
    assert both == ["one", *lines, "", "other", *lines]


def test_reports_of_one_kind_stand_under_their_steps() -> None:
    reports = {
        name: Report("preference", [Measure("preference", v, v, v, 9, "share")])
        for name, v in (("first", 0.5), ("second", 0.7))
    }
    both = {name: {"preference": 3 * [v]} for name, v in (("first", 0.5), ("second", 0.7))}
    assert summary_of(reports) == both
    assert summary_of({"first": reports["first"]}) == both["first"]
    lines = table_of(reports).splitlines()
    assert lines[0] == "first: preference" and "second: preference" in lines
    assert table_of({"first": reports["first"]}).startswith("preference\n")
    sums = {n: Report("t", [], meta={"kind": "before_after", "summary": {"n": 4}}) for n in "ab"}
    assert summary_of(sums | reports) == {"a": {"n": 4}, "b": {"n": 4}}


def test_a_measure_takes_no_name_of_the_line_that_it_stands_in() -> None:
    made = Report("t", [Measure(n, 2.0, 2.0, 2.0, 9) for n in ("seconds", "latency", "cost")])
    own = {"seconds": 3 * [2.0], "cost": 3 * [2.0]}
    assert summary_of({"t": made}) == {"latency": 3 * [2.0], "measures": own}


def test_what_is_found_beside_measures_is_told() -> None:
    part = Measure("refusal rate", 0.92, 0.9, 0.94, 50, "share", "cost 0")
    made = Report("cost to undo", [part], meta={"notes": ["not within 192"]})
    assert table_of({"undo": made}).splitlines()[-1] == "not within 192"
    assert about(made) == "cost to undo: not within 192"


def test_numbers_have_the_places_that_they_need() -> None:
    def said(*numbers: float) -> str:
        return about(Report("t", [Measure("m", *numbers, 9, "", "", "lower")]))

    assert said(1280.0, 1280.0, 1280.0) == "t: m 1280" and said(0.75, 0.75, 0.75) == "t: m 0.75"
    assert said(0.0002, 0.0001, 0.0004) == "t: m 0.0002 [0.0001, 0.0004]"
    assert said(0.5, 0.25, 0.75) == "t: m 0.500 [0.250, 0.750]"


def test_which_way_is_good_is_told() -> None:
    table = table_of({"m": Report("t", [Measure("m", 0.5, 0.25, 0.75, 9, "share", "", "lower")])})
    assert table.splitlines()[-1].split()[-4:] == ["share", "lower", "is", "better"]


def test_cells_of_data_stay_in_their_columns() -> None:
    table = rows_text([("category", "n"), ("a\x1b[2J\nb", "1"), ("\u65e5\u672c", "22")])
    lines = table.splitlines()
    assert "\x1b" not in table and len(lines) == 4
    assert len({width(line.rpartition(" ")[0]) for line in lines}) == 1

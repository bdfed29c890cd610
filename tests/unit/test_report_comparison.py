"""Comparisons on the page: order, numbers, one disc a method."""

from __future__ import annotations

import pytest

from truing.report import render
from truing.report.comparison import compared
from truing.reports import Measure, Report

MANIFEST = {
    "schema_version": 1,
    "name": "compare",
    "recipe": "",
    "plan_key": "k",
    "seed": 0,
    "started": "",
    "seconds": 1.0,
    "status": "done",
    "versions": {},
    "hardware": {},
    "models": {},
    "steps": {},
    "result": {},
}


def report(seeds: int = 3) -> Report:
    measures: list[Measure] = []
    for name, gain, side, seconds in (("ipo", 0.02, 0.01, 30.0), ("dpo", 0.11, -0.002, 60.0)):
        width = 0.01 if seeds > 1 else 0.0
        for what, value in (("gain", gain), ("side effect", side), ("seconds", seconds)):
            measures.append(Measure(what, value, value - width, value + width, seeds, "", name))
    return Report("comparison", measures, None, {"kind": "comparison", "seeds": seeds})


def test_the_largest_gain_comes_first_with_its_numbers() -> None:
    found = compared("comparison", report())
    assert [c.name for c in found.contenders] == ["dpo", "ipo"]
    assert found.contenders[0].texts()[:2] == ("+11.0", "+10.0 to +12.0")
    assert found.contenders[0].texts()[2] == "\u22120.0020"
    assert "dpo gained most: +11.0 points" in found.headline
    assert found.chart.count("<circle") == 2


def test_discs_grow_with_cost_and_stand_where_the_values_are() -> None:
    chart = str(compared("comparison", report()).chart)
    dpo, ipo = (chart[chart.index(f"{n}: gain") :] for n in ("dpo", "ipo"))

    def number(text: str, name: str) -> float:
        return float(text.split(f'{name}="', 1)[1].split('"', 1)[0].rstrip("%"))

    assert number(dpo, " r") > number(ipo, " r")
    assert number(dpo, "cx") > number(ipo, "cx")
    assert number(dpo, "cy") > number(ipo, "cy")  # less side effect lies lower


def test_one_seed_has_no_interval_and_the_page_shows_it() -> None:
    page = render(MANIFEST, [], {"comparison": report(seeds=1)})
    assert page.count("one seed") == 4
    assert "<h1>Of 2 methods, dpo gained most" in page
    assert pytest.approx(0.11) == report().get("gain", "dpo").value

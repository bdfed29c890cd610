"""Comparisons on the page: order, numbers, one disc a method, each number to be read."""

from __future__ import annotations

import random
import re
from itertools import combinations

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
    assert "(95 % interval +10.0 to +12.0), at \u22120.0020 nats" in found.headline
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
    assert "Bands are" not in page
    assert "Bands are 95 % intervals over 3 seeds" in render(MANIFEST, [], {"c": report()})
    assert "<h1>Of 2 methods, dpo gained most" in page
    assert pytest.approx(0.11) == report().get("gain", "dpo").value


@pytest.mark.parametrize(
    ("gains", "width", "said"),
    [
        ((0.0, 0.0, 0.0), 0.0, "None of 3 methods clearly gained: +0.0 points"),
        ((0.02, 0.01, -0.1), 0.05, "None of 3 methods clearly gained: +2.0 points"),
        ((0.05, 0.01, 0.0501), 0.01, "2 of 3 methods gained most: +5.0 points"),
        ((-0.021,), 0.01, "m0 did not clearly gain: \u22122.1 points"),
    ],
)
def test_no_method_is_named_where_none_is_ahead(
    gains: tuple[float, ...], width: float, said: str
) -> None:
    measures: list[Measure] = []
    for i, gain in enumerate(gains):
        measures.append(Measure("gain", gain, gain - width, gain + width, 3, "share", f"m{i}"))
        measures.append(Measure("side effect", 0.01, 0.0, 0.02, 3, "nats per token", f"m{i}"))
    found = compared("c", Report("c", measures, None, {"kind": "comparison", "seeds": 3}))
    assert found.headline.startswith(said)


def crowd(n: int, near: float = 1.0) -> Report:
    """`n` methods whose gains and side effects are as near to each other as `near` says."""
    source, measures = random.Random(0), list[Measure]()
    for i in range(n):
        values = {
            "gain": 0.18 + near * source.uniform(-0.05, 0.05),
            "side effect": near * source.uniform(-0.012, 0.012),
            "seconds": source.uniform(5, 60),
        }
        for what, value in values.items():
            measures.append(Measure(what, value, value - 0.1, value + 0.1, 3, "", f"m{i}"))
    return Report("comparison", measures, None, {"kind": "comparison", "seeds": 3})


@pytest.mark.parametrize(("n", "near"), [(13, 1.0), (38, 1.0), (38, 0.1), (38, 0.0)])
def test_all_numbers_can_be_read_at_any_width(n: int, near: float) -> None:
    found = compared("comparison", crowd(n, near))
    circle = r'<title>(\w+): [^<]*</title><circle cx="([\d.]+)%" cy="([\d.]+)" r="([\d.]+)"'
    discs = {name: [float(v) for v in at] for name, *at in re.findall(circle, found.chart)}
    text = r'<text x="([\d.]+)%" y="([\d.]+)" text-anchor="middle" class="number[^"]*">(\d+)</text>'
    numbers = {int(k): (float(x), float(y) - 4) for x, y, k in re.findall(text, found.chart)}
    assert sorted(numbers) == list(range(1, n + 1)) and len(discs) == n
    names = {c.number: c.name for c in found.contenders}
    for width in (520, 800, 1045):  # the style lets none be narrower
        at = {k: (x / 100 * width, y) for k, (x, y) in numbers.items()}
        for (ax, ay), (bx, by) in combinations(at.values(), 2):
            assert abs(ax - bx) >= 16 or abs(ay - by) >= 12, width
        for k, (x, y) in at.items():
            assert 0 <= x <= width and 0 <= y <= 340
            for name, (cx, cy, r) in discs.items():
                away = (x - cx / 100 * width) ** 2 + (y - cy) ** 2
                assert away >= r * r or name == names[k], (width, k, name)
    assert ".scatter { overflow: visible; min-width: 520px; }" in render(MANIFEST, [], {})
    assert found.chart.count('class="leader"') == found.chart.count('class="number moved"') > 0


def test_lone_discs_carry_their_numbers() -> None:
    chart = compared("comparison", report()).chart
    assert chart.count('class="number"') == 2 and "leader" not in chart and "covered" not in chart


def test_without_times_no_size_is_told() -> None:
    timed = report()
    untimed = Report("comparison", [m for m in timed if m.name != "seconds"], None, timed.meta)
    page = render(MANIFEST, [], {"comparison": untimed})
    assert "Larger discs took longer" in render(MANIFEST, [], {"comparison": timed})
    assert "Larger discs took longer" not in page and "a run</th>" not in page
    found = compared("comparison", untimed)
    assert set(re.findall(r' r="([\d.]+)"', found.chart)) == {"9.0"}
    assert [len(c.texts()) for c in found.contenders] == [4, 4]

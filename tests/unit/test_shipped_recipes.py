"""Every recipe of the repository is a checked graph: methods, settings and edges are right."""

from __future__ import annotations

from pathlib import Path

import pytest

from truing import recipe
from truing.sources import check_tables

FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(p for p in FOLDER.glob("*.*") if p.suffix == ".py" or "\nsteps:" in p.read_text())


def test_there_are_recipes() -> None:
    assert {"quickstart", "dialectical_alignment", "baichuan_alignment", "easy_to_hard",
            "weak_to_strong", "honesty"} <= {p.stem for p in RECIPES}  # fmt: skip


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_it_is_right_and_its_files_are_there(path: Path) -> None:
    plan = recipe.load(path)
    assert plan.steps
    check_tables(plan.check(), {})  # steps take the kinds of rows that others will make
    for source in plan.data.values():
        file = FOLDER / source
        # A set of the mirror is written set/part; everything else with a suffix is a file.
        assert file.is_file() or not file.suffix


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_what_a_gain_cost_is_measured_beside_it(path: Path) -> None:
    checked = recipe.load(path).check()
    evaluated = [one for one in checked if one.method.verb == "evaluate"]
    asked = [
        one.sources["model"][""].text for one in evaluated if one.method.id == "evaluate/ability"
    ]
    assert len(set(asked)) > 1 or not evaluated  # of two models at least

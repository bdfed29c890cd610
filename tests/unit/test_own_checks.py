"""`@checks`: what a function of one's own refuses before anything runs, and where it is asked."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

import pytest

from truing import checks, component, method, methods, objective, recipe, run
from truing.core.judging.scores import check_reward
from truing.core.objective import Loss, Measurements
from truing.errors import InputError
from truing.models import Model
from truing.principles import Principle, Principles
from truing.references import referred
from truing.specify.principles_file import check_all
from truing.tables import Row, Table

PLAN = """
from truing import InputError, Plan, checks, component, method
from truing.tables import Table


def sensible(settings):
    if settings.get("most", 4) < 1:
        raise InputError("setting 'most' must be 1 or more", seen=settings["most"], fix="Raise it")


def answered(rows, *, column="answer"):
    for number, row in enumerate(rows, 1):
        if column not in row:
            raise InputError(f"no {column}", where=f"row {number}", fix="Give one")


@component("reward")
@checks(sensible, rows=answered)
def right(rows, *, most: int = 4, column: str = "answer"):
    raise AssertionError("drawn")


def both(settings, tables):
    if "data" in tables and settings["least"] > len(tables["data"]):
        raise InputError("setting 'least' is more than there are", fix="Lower it")


@method(verb="select")
@checks(both)
def enough(data: Table, *, least: int = 1) -> Table:
    raise AssertionError("ran")


def recipe():
    plan = Plan("careful")
    plan.step({step})
    return plan
"""
TRAINED = (
    '"t", "train/grpo", model={model!r}, data={data!r}, steps=1, batch=2, answers=2, max_tokens=2, '
    'rank=2, rewards={{"r": {{"use": "right", {settings}}}}}'
)
SELECTED = '"s", "select/enough", data={data!r}, least=3'


def refused(function: object) -> None:
    raise InputError("refused", fix="Never mind")


@pytest.mark.parametrize(
    ("step", "wanted"),
    [
        (TRAINED.replace("{settings}", "'most': 0"), "setting 'most' must be 1 or more"),
        (TRAINED.replace("{settings}", ""), "no answer"),
        (TRAINED.replace("{settings}", "'column': 'gold'"), "no gold"),
        (SELECTED, "setting 'least' is more than there are"),
    ],
)
def test_in_a_recipe_it_is_asked_before_anything_runs(
    tmp_path: Path, tiny_path: Path, step: str, wanted: str
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "3 + 4 ="}\n{"prompt": "9 - 1 =", "answer": "8"}\n')
    path = tmp_path / "careful.py"
    said = step.format(model=str(tiny_path), data=str(data))
    path.write_text(PLAN.replace("{step}", said))
    with pytest.raises(InputError) as caught:
        run(recipe.load(path), tmp_path / "runs")
    assert wanted in caught.value.message and caught.value.fix


def test_in_a_call_a_function_as_it_is_has_its_own(tiny_path: Path) -> None:
    asked: list[object] = []

    @checks(asked.append, rows=lambda rows: asked.append(len(rows)))
    def short(rows: list[Row]) -> list[float]:
        assert len(asked) >= 2
        return [1.0 for _ in rows]

    data = Table("prompt", [{"prompt": "a"}, {"prompt": "b"}])
    small: dict[str, object] = {"steps": 1, "batch": 2, "answers": 2, "max_tokens": 2}
    methods["grpo"](Model.open(tiny_path), data, rewards={"short": short}, **small)
    assert {} in asked and 2 in asked


def test_what_a_check_raises_is_told_with_its_place() -> None:
    def broken(settings: Mapping[str, object]) -> None:
        settings["nothing"]

    @checks(broken)
    def short(rows: list[Row]) -> list[float]:
        return [1.0 for _ in rows]

    ref = cast("dict[str, object]", referred(short))
    with pytest.raises(InputError, match="its check raised KeyError") as caught:
        check_reward(ref, where="here")
    assert __file__ in caught.value.fix and caught.value.where == "here"


def rows_of(rows: list[Row]) -> list[float]:
    return [0.0 for _ in rows]


MISTAKES: dict[str, Callable[[], object]] = {
    "takes functions": lambda: checks(),
    "takes functions ": lambda: checks("sensible"),  # type: ignore[arg-type]
    "takes functions  ": lambda: component("reward")(checks(rows_of)),  # without its brackets
    "stands above a function": lambda: checks(refused)([1.0]),  # type: ignore[type-var]
    "stands once, below": lambda: checks(refused)(checks(refused)(copy(rows_of))),
    "stands once, below ": lambda: checks(refused)(component("reward")(copy(rows_of))),
    "nothing asks the check of settings": lambda: component("decoder")(
        checks(refused)(copy(rows_of))
    ),
    "nothing asks the rows=": lambda: component("judge")(checks(rows=refused)(copy(rows_of))),
    "nothing asks the rows= ": lambda: method(verb="select")(checks(rows=refused)(copy(rows_of))),
    "nothing asks the check of settings ": lambda: objective(unit="pair", rows="pair")(
        checks(refused)(loss)
    ),
}


def copy(function: Callable[[list[Row]], list[float]]) -> Callable[[list[Row]], list[float]]:
    """Another function of the same sort, so that nothing is known of it."""
    return types.FunctionType(function.__code__, {"__name__": __name__})


def loss(m: Measurements) -> Loss:
    return Loss(m.seq()[:, 0])


@pytest.mark.parametrize("said", MISTAKES)
def test_where_nothing_would_ask_it_it_is_refused(said: str) -> None:
    with pytest.raises(InputError, match=said.strip()) as caught:
        MISTAKES[said]()
    assert caught.value.fix


FILTER = """
from truing import InputError, Plan, checks, component


def sensible(settings):
    if settings.get("most") == 0:
        raise InputError("setting 'most' must be 1 or more", fix="Raise it")


@component("check")
@checks(sensible)
def short_enough(rows, *, most: int = 4):
    raise AssertionError("asked")


def recipe():
    plan = Plan("filter")
    plan.step("s", "select/checked", data="rows.jsonl", checks=[{"use": "short_enough", "most": 0}])
    return plan
"""


def test_checks_of_principles_and_filters_are_asked(tmp_path: Path) -> None:
    """A check's settings are refused where principles are read, and before rows are filtered."""
    (tmp_path / "own.py").write_text(FILTER)
    Table("", [{"prompt": "a"}]).write(tmp_path / "rows.jsonl")
    with pytest.raises(InputError, match="line 18 step s: setting 'most' must be 1 or more"):
        recipe.load(tmp_path / "own.py")
    rule = Principle(id="brief", text="Be brief.", check={"use": "short_enough", "most": 0})
    with pytest.raises(InputError, match="'most' must be 1 or more"):
        check_all(Principles([rule]))

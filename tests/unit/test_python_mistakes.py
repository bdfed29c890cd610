"""What a user gives wrongly in Python is named with a remedy, as it is on the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from truing.context import Context
from truing.errors import InputError
from truing.given import as_noun
from truing.models import Model
from truing.pipeline import run
from truing.plan import Plan
from truing.principles import Principle, Principles
from truing.reports import Measure, Report
from truing.tables import Table

given: Any = ["a"]  # of a type that no argument has
TABLE = Table("prompt", [{"prompt": "Why?"}, {"prompt": "How?"}])
RULES = Principles([Principle("brief", "Be brief.")])
NOWHERE = "/proc/truing-nowhere"  # where nobody can make anything


@pytest.mark.parametrize(
    ("call", "part"),
    [
        (lambda: Table.read("pairs.jsonl", limit=-1), "Table.read: limit must be at least 0"),
        (lambda: Table.read(given), "Table.read: a table is read from a path"),
        (lambda: Table("prompt", [{"prompt": "a", 3: 4}]), "row 1: names of columns must be texts"),  # type: ignore[dict-item]
        (lambda: Table("prompt", [TABLE[0], given]), "table row 2: a row must be a dict"),
        (lambda: TABLE.map(lambda _: None), "table row 1: a row must be a dict"),  # type: ignore[arg-type,return-value]
        (lambda: Table.joined([]), "no tables to join"),
        (lambda: Principles(given), "principle 1: this is no principle"),
        (lambda: Principles([Principle("a", "b"), Principle("a", "c")]), "have the same id"),
        (lambda: TABLE.write(f"{NOWHERE}.jsonl"), "nothing can be written there"),
        (lambda: TABLE.write(f"{NOWHERE}/deep/x.parquet"), "nothing can be written there"),
        (lambda: TABLE.save(NOWHERE), "nothing can be written there"),
        (lambda: RULES.save(NOWHERE), "nothing can be written there"),
        (
            lambda: Report("r", [Measure("m", 1, 1, 1, 1)]).save(NOWHERE),
            "nothing can be written there",
        ),
        (lambda: TABLE.write(f"{__file__}/x.csv"), "nothing can be written there"),
    ],
)
def test_a_mistake_is_named(call: Callable[[], object], part: str) -> None:
    with pytest.raises(InputError) as error:
        call()
    assert part in str(error.value) and error.value.fix


def test_the_sign_of_home_is_no_folder(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    report, model = Report("r", [Measure("m", 1, 1, 1, 1)]), Model.open(tiny_path)
    made = [TABLE.write("~/r.jsonl"), TABLE.save("~/table"), RULES.save("~/rules")]
    made += [report.save("~/report"), model.save("~/model"), model.export("~/plain")]
    assert all(path.is_relative_to(tmp_path) for path in made) and not Path("~").exists()
    assert Table.read("~/r.jsonl").key == Table.load("~/table").key == TABLE.key
    assert Principles.load("~/rules").key == as_noun("Principles", "~/rules", "").key == RULES.key
    assert Report.load("~/report").key == report.key and Model.load("~/model").key == model.key
    assert Context(folder=Path("~/scratch")).folder == tmp_path / "scratch"
    plan = Plan("plan")
    plan.step("few", "select/sample", data="~/r.jsonl", n=1)
    assert run(plan, "~/runs").folder.is_relative_to(tmp_path)


@pytest.mark.parametrize("ways", ["save", "export"])
def test_a_model_that_cannot_be_written_there(tiny_path: Path, ways: str) -> None:
    with pytest.raises(InputError, match=f"{NOWHERE}.*nothing can be written there") as error:
        getattr(Model.open(tiny_path), ways)(f"{NOWHERE}/x")
    assert "Name a folder that you may write in" in error.value.fix

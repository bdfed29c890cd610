"""Rows without what a reward needs of them are named by their file, before anything is drawn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from truing.core.rl.gold import check_gold
from truing.errors import InputError
from truing.method import methods
from truing.models import Model
from truing.tables import Row, Table

TESTS: list[object] = ["assert True"]


def written(folder: Path, good: Row, bad: Row) -> Table:
    """Twenty prompts after an empty line, the eighteenth of which is the bad one."""
    rows = [{"prompt": f"p{i}", **(bad if i == 17 else good)} for i in range(20)]
    path = folder / "t.jsonl"
    path.write_text("\n" + "".join(json.dumps(r) + "\n" for r in rows))
    return Table.read(path)


@pytest.mark.parametrize(
    ("ref", "good", "bad", "told"),
    [
        ({"use": "numeric_answer"}, {"answer": "4"}, {}, "column 'answer' holds no number"),
        ({"use": "numeric_answer", "column": "n"}, {"n": 4}, {"n": "x"}, "column 'n' holds no"),
        ({"use": "contains_answer"}, {"answers": ["lime"]}, {}, "right answers"),
        ({"use": "passes_tests"}, {"tests": TESTS}, {"tests": [1]}, "must hold tests"),
        ({"use": "survival_answer"}, {"status": 1}, {}, "'status' must be 0"),
        ({"use": "tagged_answer"}, {"answer": "4"}, {"gold": 4}, "'answer' is missing"),
    ],
)
def test_the_row_of_the_file_is_named(
    ref: dict[str, object], good: Row, bad: Row, told: str, tmp_path: Path
) -> None:
    table = written(tmp_path, good, bad)
    check_gold({"r": ref}, table.take(range(17)), "train/x")
    with pytest.raises(InputError, match=told) as error:
        check_gold({"short": {"use": "max_words", "n": 4}, "r": ref}, table, "train/x")
    assert error.value.where == f"train/x reward 'r' {tmp_path / 't.jsonl'} row 19"


@pytest.mark.parametrize("held", [False, True])
def test_it_ends_before_a_model_is_in_memory(
    held: bool, tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = written(tmp_path, {"answer": "4"}, {})
    tables = (table.take([0, 1]), table) if held else (table, None)
    monkeypatch.setattr(Model, "load_module", None)
    with pytest.raises(InputError, match="holds no number") as error:
        methods["grpo"](
            Model.open(tiny_path), tables[0], held_out=tables[1], steps=1,
            rewards={"right": {"use": "numeric_answer"}},
        )  # fmt: skip
    assert error.value.where.endswith("t.jsonl row 19")


def test_what_a_reward_of_the_users_own_raises_names_the_prompt(tiny_path: Path) -> None:
    def gold(rows: list[Row]) -> list[float]:
        return [float(str(r["gold"])) for r in rows]

    rows: list[Row] = [{"prompt": "first", "gold": "1"}, {"prompt": "second", "gold": "none"}]
    with pytest.raises(InputError, match="raised ValueError") as error:
        methods["grpo"](
            Model.open(tiny_path), Table("prompt", rows), steps=1, batch=2, answers=2,
            max_tokens=2, rank=2, rewards={"r": gold},
        )  # fmt: skip
    assert error.value.where.endswith("reward 'r' an answer to 'second'")

"""Columns that are renamed as rows are read, wherever a table is named."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from truing import recipe
from truing.core.trainer.preflight import check_rows
from truing.errors import InputError
from truing.pipeline import run
from truing.plan import Plan
from truing.renaming import split, written
from truing.tables import Row, Table

ROWS: list[Row] = [{"question": "Why?", "answer": "So."}, {"question": "12", "answer": "No."}]
TOLD = "?prompt=question&completion=answer"
WANTED = [{"prompt": "Why?", "completion": "So."}, {"prompt": "12", "completion": "No."}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The same rows in a file of every form, and in shards."""
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "rows.jsonl").write_text(lines)
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    (tmp_path / "rows.csv").write_text("question,answer\nWhy?,So.\n12,No.\n")
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    (tmp_path / "shards").mkdir()
    for i, line in enumerate(lines.splitlines()):
        (tmp_path / "shards" / f"train-{i:05}-of-00002.jsonl").write_text(line)
    return tmp_path


def plain(table: Table) -> list[Row]:
    return [{n: v for n, v in row.items() if n not in ("id", "lineage")} for row in table]


NAMES = ["rows.jsonl", "rows.jsonl.gz", "rows.json", "rows.csv", "rows.parquet", "shards",
         "shards/train", "shards/train-*.jsonl"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_columns_of_every_form_of_file_are_renamed_before_the_kind_is_told(
    folder: Path, name: str
) -> None:
    table = Table.read(f"{folder / name}{TOLD}")
    assert table.kind == "example" and plain(table) == WANTED
    columns = {"prompt": "question", "completion": "answer"}
    assert Table.read(folder / name, columns=columns).key == table.key
    assert table.key == Table.read(f"{folder / 'rows.jsonl'}{TOLD}").key
    assert table.key != Table.read(folder / name).key
    assert len(Table.read(f"{folder / name}{TOLD}", limit=1)) == 1


def test_columns_of_a_set_are_those_that_its_rows_have_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gsm8k").mkdir()
    solved = {"question": "1+1?", "answer": "Add. #### 2"}
    (tmp_path / "gsm8k" / "train.jsonl").write_text(json.dumps(solved))
    entry = {"name": "gsm8k", "title": "Sums", "licence": "MIT", "files": [{"file": "train.jsonl"}]}
    (tmp_path / "index.json").write_text(json.dumps([entry]))
    monkeypatch.setenv("TRUING_DATA", str(tmp_path))
    table = Table.read("gsm8k?completion=answer&solution=completion")
    assert plain(table) == [{"prompt": "1+1?", "solution": "Add. #### 2", "completion": "2"}]
    assert table.kind == "example" and "MIT" in str(table[0]["lineage"])
    assert Table.read("gsm8k/train?text=completion", "text")[0]["text"] == "Add. #### 2"
    with pytest.raises(InputError, match="'completion' is there already"):
        Table.read("gsm8k?completion=answer")


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ("?prompt=qestion", r"unknown column 'qestion'.*'question', 'answer'.*mean 'question'"),
        ("?question=prompt", r"name here stands first: \?prompt=question"),
        ("?answer=question", r"'answer' is there already.*\?answer=question&old_answer=answer"),
        ("?prompt=question&prompt=answer", "'prompt' is named twice"),
        ("?prompt=question&completion=question", "'question' is named twice"),
        ("?lineage=question", "'lineage' is truing's"),
    ],
)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.parquet"])
def test_what_cannot_be_renamed_is_told(folder: Path, name: str, columns: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        Table.read(f"{folder / name}{columns}")


def test_two_columns_may_swap_their_names(folder: Path) -> None:
    for name in ("rows.jsonl", "rows.csv"):
        table = Table.read(f"{folder / name}?question=answer&answer=question")
        assert plain(table)[0] == {"answer": "Why?", "question": "So."}


def test_a_saved_table_gets_the_kind_of_its_new_columns(folder: Path) -> None:
    saved = Table("prompt", [{"prompt": "Why?", "said": "So.", "old": None}])
    saved.write(folder / "saved.parquet")
    assert Table.read(f"{folder / 'saved.parquet'}?completion=said").kind == "example"
    with pytest.raises(InputError, match="columns are renamed by a mapping"):
        Table.read(folder / "saved.parquet", columns={"prompt": 3})  # type: ignore[dict-item]


def test_what_is_said_behind_a_name_is_told_from_the_name(folder: Path) -> None:
    for whole in ("data/train-0000?-of-3.jsonl", "https://h/f.jsonl?token=a#sha256=0", "a?b"):
        assert split(whole) == (whole, {})
    assert split("https://h/f?token=a#sha256=0?prompt=q") == (
        "https://h/f?token=a#sha256=0", {"prompt": "q"},
    )  # fmt: skip
    odd = {"prompt": "Q & A?", "completion": "a=b%"}
    assert split(written("rows.jsonl", odd)) == ("rows.jsonl", odd)
    assert split(f"a?b={'c' * 300}") == ("a", {"b": "c" * 300})
    (folder / "odd?a=b.jsonl").write_text('{"text": "Hm."}')
    assert Table.read(folder / "odd?a=b.jsonl").kind == "text"


@pytest.mark.parametrize(
    ("row", "kind", "told"),
    [
        ({"question": "a", "answer": "b"}, "example", r"\?prompt=question&completion=answer'"),
        ({"frage": "a", "antwort": "b"}, "example", r"\?prompt=frage&completion=antwort'"),
        ({"prompt": "a", "good": "b", "bad": "c"}, "pair", r"\?chosen=good&rejected=bad'"),
        ({"query": "a", "response_chosen": "b", "response_rejected": "c"}, "pair",
         r"\?prompt=query&chosen=response_chosen&rejected=response_rejected'"),
        ({"question": "a", "x": "b", "y": "c"}, "pair",
         r"\?prompt=question&chosen=COLUMN&rejected=COLUMN'"),
        ({"prompt": "a", "chosn": "b", "rejected": "c"}, "pair", r"by 'chosn'\?.*\?chosen=chosn'"),
        ({"conversation": [{"role": "user", "content": "a"}]}, "example",
         r"\?messages=conversation'"),
        ({"number": 3}, "example", "Table.map makes them"),
    ],
)  # fmt: skip
def test_rows_that_are_refused_are_told_how_their_columns_are_renamed(
    row: Row, kind: str, told: str
) -> None:
    with pytest.raises(InputError, match=told):
        check_rows(Table("", [row]), kind, "train/some")


RECIPE = """
models: {{base: {model}}}
data:
  mine: {entry}
steps:
  few: {{do: select/sample, data: "mine{more}", n: 1}}
"""


@pytest.mark.parametrize(
    ("entry", "more"),
    [
        ("{file: rows.jsonl, columns: {prompt: question, completion: answer}}", ""),
        ("{name: 'rows.jsonl?prompt=question', columns: {completion: answer}}", ""),
        (f"rows.jsonl{TOLD}", ""),
        ("rows.jsonl", TOLD),
        ("{file: rows.jsonl, columns: {prompt: question}}", "?completion=answer"),
        ("{file: shards, columns: {prompt: question, completion: answer}}", ""),
    ],
)
def test_an_entry_of_a_recipe_renames_columns(folder: Path, entry: str, more: str) -> None:
    (folder / "mine.yaml").write_text(RECIPE.format(model="any", entry=entry, more=more))
    result = run(recipe.load(folder / "mine.yaml"), runs=folder / "runs")
    (made,) = result.results.values()
    assert isinstance(made, Table) and made.kind == "example" and plain(made)[0] in WANTED


def test_an_entry_stands_below_data_and_is_named_in_a_step(folder: Path) -> None:
    text = RECIPE.format(model="any", entry="rows.jsonl", more="")
    entry = "{file: rows.jsonl, columns: {text: answer}}"
    (folder / "mine.yaml").write_text(text.replace('data: "mine"', f"data: {entry}"))
    with pytest.raises(InputError, match=r"line 6.*Write it below data: with a name"):
        recipe.load(folder / "mine.yaml")


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ("{file: rows.jsonl, colums: {prompt: question}}", "'colums'.*mean 'columns'"),
        ("{columns: {prompt: question}}", "rows have a file or the name of a set"),
        ("{file: a, name: b}", "rows have a file or the name of a set"),
        ("{file: rows.jsonl, columns: [question]}", "renamed by a mapping"),
        ("{file: rows.jsonl, columns: {prompt: 3}}", "renamed by a mapping"),
    ],
)
def test_mistakes_in_an_entry_have_its_line(folder: Path, entry: str, told: str) -> None:
    (folder / "mine.yaml").write_text(RECIPE.format(model="any", entry=entry, more=""))
    with pytest.raises(InputError, match=f"line 4.*{told}"):
        recipe.load(folder / "mine.yaml")


def test_a_plan_in_python_and_one_changed_on_the_command_line(folder: Path) -> None:
    plan = Plan("mine", folder=folder)
    columns = {"prompt": "question", "completion": "answer"}
    plan.table("rows", {"file": "rows.jsonl", "columns": columns})
    plan.step("few", "select/sample", data="rows", n=1)
    (one,) = plan.check()
    (source,) = one.sources["data"].values()
    assert source.text == f"{folder / 'rows.jsonl'}{TOLD}"
    plan.override(f"data.rows={{file: {folder / 'rows.csv'}, columns: {{text: answer}}}}")
    (one,) = plan.check()
    (source,) = one.sources["data"].values()
    assert source.text == f"{folder / 'rows.csv'}?text=answer"


def test_a_column_is_not_renamed_twice(folder: Path) -> None:
    with pytest.raises(InputError, match="'question' is named twice"):
        Table.read("rows.jsonl?prompt=question", columns={"text": "question"})


def test_advice_for_rows_that_hold_arrays() -> None:
    rows = Table("", [{"prompt": "a", "completion": "b", "embedding": np.zeros(3)}])
    with pytest.raises(InputError, match="needs rows of kind"):
        check_rows(rows, "unpaired", "train/kto")


def test_a_name_with_a_comma_is_one_word_of_a_command(folder: Path) -> None:
    told = written("rows.jsonl", {"prompt": "question, long"})
    assert "," not in told and split(told)[1] == {"prompt": "question, long"}

"""The number of a row in an error is the line of the file where the row begins."""

import gzip
import json
from pathlib import Path

import pytest

from truing.core.batch.row_kinds import as_kind
from truing.core.batch.training_rows import Reader
from truing.core.objective import Objective
from truing.errors import InputError
from truing.evaluate.router_report import domains_of
from truing.models import Model
from truing.tables import Table

GOOD = {"prompt": "a", "chosen": "b", "rejected": "c"}
BAD = {"prompt": "a", "chosen": 3, "rejected": "c"}


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
@pytest.mark.parametrize("fault", [json.dumps(BAD), '{"prompt": '])
def test_blank_lines_count(tmp_path: Path, suffix: str, fault: str) -> None:
    text = f"{json.dumps(GOOD)}\n\n   \n\n{fault}\n".encode()
    path = tmp_path / f"t{suffix}"
    path.write_bytes(gzip.compress(text) if suffix.endswith(".gz") else text)
    with pytest.raises(InputError) as error:
        Table.read(path)
    assert error.value.where == f"{path} row 5"


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        # The second record begins in line 4: the first holds a quoted line break.
        ('prompt,completion,label\n"a\nb",c,true\n\n"d\ne",f,perhaps\n', 5, "'label' must be"),
        ('prompt,completion,label\n"a\nb",c,true\n"d\n,e",f\n', 4, "'label' is missing"),
        ('prompt,completion,label\n"a\nb",c,true\nd,e,true,f\n', 4, "more fields"),
        ('\nprompt,completion,label\r\n"a\r\n\r\nb",c,true\r\nd,e,no\r\n', 6, "'label' must be"),
    ],
)
def test_a_csv_record_is_named_by_the_line_where_it_begins(
    tmp_path: Path, text: str, line: int, said: str
) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(text.encode())
    with pytest.raises(InputError, match=said) as error:
        Table.read(path, "unpaired")
    assert error.value.where == f"{path} row {line}"


def test_numbers_follow_the_rows(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(f'\n{{"prompt": "{i}"}}' for i in range(4)) + "\n")
    table = Table.read(path, "prompt")
    assert [table.place(i) for i in range(4)] == [f"{path} row {n}" for n in (2, 4, 6, 8)]
    odd = table.where(lambda row: row["prompt"] in ("1", "3"))
    changed = odd.with_lineage(filter="x").map(lambda row: row)
    assert [changed.number(i) for i in range(2)] == [4, 8]
    assert odd.split(1)[1].place(0) == f"{path} row 8"
    assert Table.read(path, "prompt", limit=2).place(1) == f"{path} row 4"
    assert Table("prompt", [{"prompt": "x"}]).place(0) == "table row 1"


def test_parquet_counts_rows(tmp_path: Path) -> None:
    Table("record", [{"prompt": "a"}, {"prompt": "b", "chosen": "c"}]).write(tmp_path / "t.parquet")
    with pytest.raises(InputError, match=r"t\.parquet row 1: field 'chosen' is missing"):
        Table.read(tmp_path / "t.parquet", "pair")


def test_what_reads_rows_names_them_by_the_file(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    good = {"prompt": "a", "completions": ["b", "c"], "scores": [1, 0]}
    rows = [good | {"completions": ["b", "b"], "scores": [1, 1]}, good, good | {"scores": [1]}]
    path.write_text("".join(f"\n{json.dumps(row)}\n" for row in rows))
    table = Table.read(path, "group")
    with pytest.raises(InputError, match="'scores'") as error:
        as_kind(table, "pair", "dpo")
    assert error.value.where == f"dpo {path} row 6"
    # Rows that are left out before do not move those after them.
    made, _ = as_kind(table.split(2)[0], "pair", "dpo")
    assert made.place(0) == f"{path} row 4"
    assert table.take([2, 1]).place(0) == f"{path} row 6"


def test_questions_are_named_by_the_file(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('\n{"prompt": "a", "domain": "x"}\n\n{"prompt": "b", "domain": [3]}\n')
    with pytest.raises(InputError) as error:
        domains_of(Table.read(path))
    assert error.value.where == f"evaluate/router_report {path} row 4"


def test_rows_that_are_trained_on_are_named_when_one_is_wrong(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = {"prompt": "a", "completion": "b", "score": 0.5}
    table = Table("judgement", [good, good | {"score": 1.0}, good], where="t.jsonl")
    table.rows[1]["score"] = float("nan")
    reader = Reader(
        Model.open(tiny_path).load_module().tokenizer,
        Objective("own", lambda: None, "pair", (), "example", {"score": None}),
        64,
    )
    asked: list[int] = []
    place = Table.place
    monkeypatch.setattr(Table, "place", lambda own, i: asked.append(i) or place(own, i))
    with pytest.raises(InputError, match="finite number in column 'score'") as error:
        reader.read(table)
    assert error.value.where == "t.jsonl row 2" and asked == [1]

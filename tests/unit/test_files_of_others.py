"""Files, terminals and homes as they come: nothing is lost, run together or told as our defect."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from truing.core import files
from truing.errors import InputError
from truing.sources import open_noun
from truing.tables import Table

ROW = '{"prompt": "caf\u00e9", "completion": "b"}\n'


@pytest.mark.parametrize(
    ("name", "data", "row", "said"),
    [
        ("list.jsonl", f"[\n{ROW}]\n".encode(), 1, "without a list around them"),
        ("wide.jsonl", ROW.encode("utf-16"), 1, "Save it as UTF-8"),
        ("old.jsonl", ROW.encode("latin-1"), 1, "Save it as UTF-8"),
        ("old.csv", "prompt\ncaf\u00e9\n".encode("latin-1"), 1, "Save it as UTF-8"),
        ("half.csv", b"prompt;completion\na;b\n", 1, "separated by commas"),
        ("half.csv", b"prompt\tcompletion\na\tb\n", 1, "separated by commas"),
        ("twice.csv", b"prompt,text,text\na,b,c\n", 1, "two columns have one name"),
        ("t.jsonl", b'{"prompt": "a", "lineage": "mine"}\n', 1, "Rename the column"),
        ("t.jsonl", b'{"id": 7, "prompt": "a"}\n\n{"id": "7", "prompt": "b"}\n', 3, "of row 1"),
        ("t.csv", b"id,prompt\n7,a\n7,b\n", 3, "make it unique"),
    ],
)
def test_what_would_be_lost_or_misread_is_told(
    tmp_path: Path, name: str, data: bytes, row: int, said: str
) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(InputError, match=said) as error:
        Table.read(path)
    assert error.value.where == f"{path} row {row}"


def test_ids_are_texts_and_repeated_rows_may_share_one(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    rows = [{"id": 0, "prompt": "a"}, {"id": 1, "prompt": "b"}, {"id": 0, "prompt": "a"}]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    table = Table.read(path)
    assert [r["id"] for r in table] == ["0", "1", "0"]
    assert Table.read(table.write(tmp_path / "t.parquet")).key == table.key


def test_a_byte_order_mark_is_none_of_the_text(tmp_path: Path) -> None:
    for name, text in (("t.jsonl", ROW), ("t.csv", "prompt,completion\ncaf\u00e9,b\n")):
        (tmp_path / name).write_bytes(text.encode("utf-8-sig"))
        assert Table.read(tmp_path / name).rows[0]["prompt"] == "caf\u00e9"


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").mkdir()
    with pytest.raises(InputError, match="a folder without"):
        open_noun("Table", str(tmp_path / "t.jsonl"))


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # the system knows of none
    for chosen in ("", "~who/cache"):
        monkeypatch.setenv("TRUING_HOME", chosen)
        with pytest.raises(InputError, match="Set TRUING_HOME"):
            files.home()
    assert files.expanded("~who/t.jsonl") == Path("~who/t.jsonl")


def test_a_terminal_that_knows_no_accents(tmp_path: Path) -> None:
    code = "import sys; from truing import output; output.check(); print('caf\\u00e9')"
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, check=True, cwd=tmp_path
    )
    assert done.stdout == b"caf\\xe9\n"

"""Files, terminals and homes as they come: nothing is lost, run together or told as our defect."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from truing.core import files
from truing.errors import InputError
from truing.plan import Plan
from truing.sources import check, open_noun
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


def shards(folder: Path, name: str, n: int, of: int) -> Path:
    """A folder with the first n shards of a table of so many, a row each."""
    folder.mkdir(exist_ok=True)
    for i in range(n):
        row = {"prompt": f"{name}{i}", "completion": "b"}
        (folder / f"{name}-{i:05}-of-{of:05}.jsonl").write_text(json.dumps(row) + "\n")
    return folder


def test_shards_are_one_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shards(tmp_path / "set", "train", 2, 2)
    (folder / "dataset_info.json").write_text("{}")
    for name in (folder, folder / "train", folder / "train-*.jsonl", folder / "*"):
        assert [r["prompt"] for r in Table.read(name)] == ["train0", "train1"]
        assert len(Table.read(name, limit=1)) == 1
    assert capsys.readouterr().err == ""
    monkeypatch.chdir(tmp_path)
    plan = Plan("p", folder=tmp_path)
    for i, name in enumerate(("set", "set/train-*.jsonl")):
        plan.step(f"some{i}", "select/sample", data=name, n=1)
    assert len(check(plan)) == 2
    assert len(Table.read("set/train-00000-of-00002.jsonl")) == 1
    assert "one of 2 shards that lie there. All of them are set/train" in capsys.readouterr().err


def test_which_shards_are_meant_is_asked(tmp_path: Path) -> None:
    folder = shards(shards(tmp_path / "set", "train", 2, 2), "test", 1, 1)
    with pytest.raises(InputError, match=r"several tables.*Say which: .*/set/test"):
        Table.read(folder)
    assert len(Table.read(folder / "test")) == 1
    with pytest.raises(InputError, match=r"2 of 3 shards of train.jsonl are there.*pattern"):
        Table.read(shards(tmp_path / "part", "train", 2, 3))


def test_a_set_that_was_saved_to_disk(tmp_path: Path) -> None:
    parts = [pa.table({"prompt": [name], "completion": ["b"]}) for name in "cab"]
    folder = tmp_path / "disk" / "train"
    folder.mkdir(parents=True)
    names = ["data-00001-of-00002.arrow", "data-00000-of-00002.arrow", "cache-1f.arrow"]
    for name, part in zip(names, parts, strict=True):
        with pa.ipc.new_stream(folder / name, part.schema) as stream:
            stream.write_table(part)
    state = {"_data_files": [{"filename": name} for name in names[:2]]}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    assert [r["prompt"] for r in Table.read(folder)] == ["c", "a"]
    (tmp_path / "disk" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(InputError, match=r"several splits.*Name one of them: .*/disk/train"):
        Table.read(tmp_path / "disk")
    with (
        pa.OSFile(str(tmp_path / "f.arrow"), "wb") as file,
        pa.ipc.new_file(file, parts[0].schema) as whole,
    ):
        whole.write_table(parts[0])
    assert Table.read(tmp_path / "f.arrow")[0]["prompt"] == "c"
    (tmp_path / "f.arrow").write_bytes(b"none")
    with pytest.raises(InputError, match="not a readable Arrow file"):
        Table.read(tmp_path / "f.arrow")


ZONED = """
import sys, zoneinfo
import pyarrow as pa, pyarrow.parquet as pq
from truing.tables import Table

zoneinfo.reset_tzpath([])
sys.modules["tzdata"] = None
for zone in ("UTC", "Europe/Berlin"):
    time = pa.array([0], pa.timestamp("us", zone))
    pq.write_table(pa.table({"prompt": ["a"], "made": time}), "t.parquet")
    try:
        Table.read("t.parquet")
    except ValueError as error:
        print(error)
"""


def test_a_system_without_time_zones_is_told_how_to_have_them(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ZONED], cwd=tmp_path, capture_output=True, text=True
    )
    said = done.stdout.splitlines()
    assert len(said) == 2 and all("pip install tzdata" in line for line in said), done


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

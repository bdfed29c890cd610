"""A table leaves as JSON Lines, .csv or Parquet in one command, by the ending of its name."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from truing import InputError, Plan, Table, cli
from truing import run as run_plan

ROWS = [
    {"prompt": 'Say "a, b"\nand stop.', "completion": "é", "score": 0.5, "n": 1},
    {"prompt": "Why?", "completion": "So.", "score": 1.0, "tags": ["x", "ü"]},
]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRUING_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path


def _told(row: dict[str, object]) -> dict[str, object]:
    return {k: v for k, v in row.items() if k not in ("id", "lineage")}


@pytest.mark.parametrize("name", ["new/got.jsonl", "got.parquet"])
def test_a_step_of_a_run_is_exported_whole(place: Path, name: str) -> None:
    plan = Plan("two")
    plan.step("kept", "select/sample", data="rows.jsonl", n=2)
    result = run_plan(plan)
    assert cli.main(["store", "export", f"{result.folder}/kept", name]) == 0
    got = Table.read(name)
    assert got.key == result.results["kept"].key  # ids and lineage, too
    assert sorted(map(str, map(_told, got))) == sorted(map(str, ROWS))
    if name.endswith(".jsonl"):
        lines = Path(name).read_text(encoding="utf-8").splitlines()
        assert [json.loads(line)["id"] for line in lines] == [row["id"] for row in got]


def test_out_writes_a_file_and_refuses_what_is_there(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["select", "sample", "--data", "rows.jsonl", "--n", "2", "--json", "--out"]
    assert cli.main([*words, "got.csv"]) == 0
    with Path("got.csv").open(encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file))
    by_prompt = {row["prompt"]: row for row in found}
    assert set(by_prompt) == {row["prompt"] for row in ROWS}
    first, second = (by_prompt[str(row["prompt"])] for row in ROWS)
    assert (first["completion"], first["score"], first["n"], first["tags"]) == ("é", "0.5", "1", "")
    assert (second["score"], second["tags"], second["n"]) == ("1.0", '["x", "ü"]', "")
    assert "lineage" not in first and len(first["id"]) == 16
    capsys.readouterr()
    before = Path("got.csv").read_bytes()
    assert cli.main([*words, "got.csv"]) == 2
    assert "there is such a file" in json.loads(capsys.readouterr().out)["error"]
    assert Path("got.csv").read_bytes() == before
    (place / "file").write_text("")
    assert cli.main([*words, "file/got.csv"]) == 2
    assert "cannot be written" in json.loads(capsys.readouterr().out)["error"]


def test_only_tables_are_files(
    place: Path,
    tiny_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("truing.pipeline.run_step", lambda *_, **__: pytest.fail("the step ran"))
    words = ["train", "sft", "--model", str(tiny_path), "--data", "rows.jsonl", "--json"]
    assert cli.main([*words, "--out", "mine.jsonl"]) == 2
    said = json.loads(capsys.readouterr().out)["error"]
    assert "a Model is written into a folder" in said and "without .jsonl" in said
    with pytest.raises(InputError, match=r"written as .jsonl, .csv, .parquet"):
        Table.read("rows.jsonl").write("rows.txt")


def test_what_json_cannot_hold_is_named(place: Path) -> None:
    table = Table("record", [{"what": b"bytes"}])
    with pytest.raises(InputError, match=r"what JSON cannot.*Write .parquet"):
        table.write("got.csv")
    assert [p.name for p in place.iterdir() if "got" in p.name] == []

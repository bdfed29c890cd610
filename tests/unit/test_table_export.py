"""A table leaves as JSON Lines, .csv or Parquet in one command, by the ending of its name."""

from __future__ import annotations

import csv
import datetime
import errno
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from truing import InputError, Plan, Report, Table, cli, pipeline
from truing import run as run_plan
from truing.store import Store

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


@pytest.mark.parametrize("name", ["said.jsonl", "said.parquet"])
def test_samples_of_a_report_are_a_file(
    place: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    store, samples = Store(), Table("example", ROWS)
    store.put("ab" * 16, Report("said", [], samples), {})
    store.put("cd" * 16, Report("silent", []), {})
    assert cli.main(["store", "export", "abab", name]) == 0
    assert Table.read(name, "example").key == samples.key
    said = _refused(capsys, ["store", "export", "cdcd", "silent.jsonl", "--json"])
    assert "this report has no samples" in said and "Name a folder" in said
    assert not Path("silent.jsonl").exists()


def test_out_takes_the_samples_of_a_report(
    place: Path, tiny_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("rules.yaml").write_text("- {id: brief, text: Be brief., check: {use: max_words, n: 1}}")
    words = ["evaluate", "adherence", "--model", str(tiny_path), "--prompts", "rows.jsonl"]
    words += ["--principles", "rules.yaml", "--max-tokens", "4", "--json"]
    assert cli.main([*words, "--out", "said.jsonl"]) == 0
    found = Table.read("said.jsonl")
    assert len(found) == len(ROWS) and {"prompt", "completion"} <= set(found.columns)


def test_a_run_is_not_one_of_its_steps(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = Plan("two")
    plan.step("kept", "select/sample", data="rows.jsonl", n=2)
    plan.step("one", "select/sample", data="kept", n=1)
    folder = run_plan(plan).folder
    for text in (f"{folder}", f"{folder}/"):
        said = _refused(capsys, ["store", "export", text, "plain", "--json"])
        assert f"Write {folder}/STEP, of its steps: kept, one" in said


def test_what_json_cannot_hold_is_named(place: Path) -> None:
    table = Table("record", [{"what": b"bytes"}])
    with pytest.raises(InputError, match=r"what JSON cannot.*Write .parquet"):
        table.write("got.csv")
    assert [p.name for p in place.iterdir() if "got" in p.name] == []


WORDS = ["select", "sample", "--data", "rows.jsonl", "--n", "2", "--json", "--out"]


def _refused(capsys: pytest.CaptureFixture[str], words: list[str], code: int = 2) -> str:
    capsys.readouterr()
    assert cli.main(words) == code
    return json.loads(capsys.readouterr().out)["error"]


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("r.json", "Name it r.jsonl"),
        ("r.CSV", "Name it r.csv"),
        ("r.jsonl.gz", "Name it r.jsonl"),
        ("deep/r.txt", "Name it r.jsonl"),
    ],
)
def test_names_of_other_files_are_no_folders(
    place: Path, capsys: pytest.CaptureFixture[str], name: str, fix: str
) -> None:
    said = _refused(capsys, [*WORDS, name])
    assert "written as .jsonl, .csv, .parquet, or into a folder" in said and fix in said
    assert not Path(name).exists()
    plan = Plan("two")
    plan.step("kept", "select/sample", data="rows.jsonl", n=2)
    folder = run_plan(plan).folder
    assert fix in _refused(capsys, ["store", "export", f"{folder}/kept", name, "--json"])


def test_folders_may_have_points_in_their_names(place: Path) -> None:
    assert cli.main([*WORDS, "sample-v1.0"]) == 0
    assert Path("sample-v1.0/table.parquet").is_file()


def test_nothing_is_made_where_nothing_is_written(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(place.rglob("*"))
    words = [w if w != "rows.jsonl" else "missing.jsonl" for w in WORDS]
    assert "no such file" in _refused(capsys, [*words, "new/deep/rows.jsonl"])
    assert [p for p in sorted(place.rglob("*")) if "home" not in p.parts] == before
    (place / "rows.csv").mkdir()
    said = _refused(capsys, [*WORDS, "rows.csv"])
    assert "a folder is in the place of the file" in said and "move the folder" in said
    said = _refused(capsys, [*WORDS, "rows.jsonl"])  # which is the data
    assert "there is such a file" in said and "delete" not in said


def test_the_length_of_a_name_is_known_before_the_step(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for length in (246, 255):  # of 255 that a name may have
        name = "n" * (length - 4) + ".csv"
        assert cli.main([*WORDS, f"new/{name}"]) == 0 and Path("new", name).is_file()
    monkeypatch.setattr("truing.pipeline.run_step", lambda *_, **__: pytest.fail("the step ran"))
    for name in ("n" * 252 + ".csv", "n" * 300 + "/r.csv", "n" * 250):
        assert "Give it a shorter name" in _refused(capsys, [*WORDS, name])


@pytest.mark.parametrize("name", ["r.csv", "folder", "new/folder"])
def test_a_full_disk_is_no_fault_of_the_place(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "mkdtemp", full)
    assert "the disk is full. Free some space" in _refused(capsys, [*WORDS, name], code=3)


def test_who_comes_second_replaces_nothing(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_step = pipeline.run_step

    def slow(*args: Any, **more: Any) -> object:
        Path("got.csv").write_text("of another")
        return run_step(*args, **more)

    monkeypatch.setattr(pipeline, "run_step", slow)
    assert "there is such a file by now" in _refused(capsys, [*WORDS, "got.csv"])
    assert Path("got.csv").read_text() == "of another"
    table = Table.read("rows.jsonl")
    assert table.write("got.csv").read_text() != "of another"  # in Python, as open() does
    with pytest.raises(InputError, match="there is such a file"):
        table.write("got.csv", new=True)
    assert not [p for p in place.iterdir() if "partial" in p.name]


COUNTED: list[dict[str, object]] = [
    {"n": np.int64(3), "x": np.float32(1.5), "on": np.bool_(True), "in": {"x": [np.float64(0.25)]}},
    {"n": np.int64(4), "x": np.float32(0.1), "on": np.bool_(False), "in": {"x": []}},
]
DATED = [{"day": datetime.date(2026, 11, 30), "at": datetime.datetime(2026, 11, 30, 4, 5)}]


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".parquet"])
def test_numbers_of_numpy_are_numbers(
    place: Path, capsys: pytest.CaptureFixture[str], ending: str
) -> None:
    again = Table.read(Table("record", COUNTED).write(f"counted{ending}"))
    if ending != ".csv":  # which takes what is nested as its text, and warns
        told = "JSON text: in." in capsys.readouterr().err  # to other programs
        assert told == (ending == ".parquet")
        assert again.column("in") == [r["in"] for r in COUNTED]
    else:
        assert again.column("in") == ['{"x": [0.25]}', '{"x": []}']
    for name in ("n", "x", "on"):
        assert again.column(name) == [v[name].item() for v in COUNTED]  # type: ignore[attr-defined]
    nothing = Table("record", [{"x": np.float32("nan"), "n": 1}])
    found = Table.read(nothing.write(f"nan{ending}"))[0].get("x")
    assert not found or (ending == ".parquet" and math.isnan(float(str(found))))


@pytest.mark.parametrize("ending", [".jsonl", ".csv"])
def test_dates_become_texts(place: Path, capsys: pytest.CaptureFixture[str], ending: str) -> None:
    table = Table.read(Table("record", DATED).write("dated.parquet"))
    assert table[0]["day"] == datetime.date(2026, 11, 30)
    again = Table.read(table.write(f"dated{ending}"))
    assert _told(again[0]) == {"day": "2026-11-30", "at": "2026-11-30T04:05:00"}
    assert "is read as '2026-11-30'" in capsys.readouterr().err


def test_what_no_file_can_hold_is_not_sent_to_another_file(place: Path) -> None:
    table = Table("record", [{"some": {"in": {1, 2}}}])
    for ending in (".jsonl", ".csv"):
        with pytest.raises(
            InputError, match=r"row 1: column .some. holds what JSON cannot"
        ) as error:
            table.write(f"sets{ending}")
        assert "of a set a list" in error.value.fix and "parquet" not in error.value.fix
    with pytest.raises(InputError, match="holds what no file can"):
        table.write("sets.parquet")


def _csv(tmp: Path, text: str) -> list[dict[str, object]]:
    (tmp / "t.csv").write_text(text)
    return [_told(row) for row in Table.read(tmp / "t.csv")]


def test_a_csv_of_rows_that_differ_in_their_columns_is_read_again(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [{"role": "user", "content": 'Say "a, b".'}]
    rows: list[dict[str, object]] = [
        {"prompt": asked, "chosen": "1", "rejected": "2", "tiny": 1e-100, "sure": True},
        {"prompt": "[1, 2]", "chosen": "b", "rejected": "", "margin": 0.5, "huge": 10**16},
        {"prompt": "7", "chosen": "b", "rejected": "c", "margin": 2.0, "tiny": 3, "huge": 0.5},
    ]
    table = Table("pair", rows).with_lineage(licence="CC BY-SA 4.0", seed=3)
    again = Table.read(table.write("pairs.csv"))
    assert again.kind == "pair" and [_told(r) for r in again] == rows
    assert [type(r.get("tiny")) for r in again] == [float, type(None), float]
    assert [r["id"] for r in again] == [r["id"] for r in table]
    assert [r["lineage"] for r in again] == [{"licence": "CC BY-SA 4.0"}] * 3
    groups = Table("group", [{"prompt": "Why?", "completions": ["x", "y"], "scores": [1, 0.5]}])
    assert _told(Table.read(groups.write("groups.csv"))[0]) == _told(groups[0])
    talks = [{"prompt": asked, "chosen": [{"role": "assistant", "content": c}],
              "rejected": [{"role": "assistant", "content": "no"}]} for c in "ab"]  # fmt: skip
    dialogues = Table("", talks)
    assert Table.read(dialogues.write("talks.csv")).key == dialogues.key
    assert capsys.readouterr().err == ""


def test_what_a_csv_cannot_hold_is_told(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"text": "a", "zip": "123", "note": "x", "n": 1}, {"text": "b", "zip": "45", "n": "x"}]
    Table("record", rows).write("got.csv")
    said = capsys.readouterr().err
    assert said.startswith("truing: warning: got.csv does not hold all as it is: ")
    assert "column 'zip' of table row 1, '123' is read as 123;" in said
    assert "column 'note' of table row 2, nothing is read as ''" in said
    assert "column 'n' of table row 1, 1 is read as '1'" in said
    assert said.count("\n") == 1 and ".jsonl and .parquet hold more" in said
    judged = [{"prompt": "a", "completion": "b", "label": "good"}]
    Table("record", judged).write("got.csv")
    assert "table row 1 cannot be read, as its field 'label' must be" in capsys.readouterr().err
    Table("record", rows).write("got.jsonl")
    assert capsys.readouterr().err == ""


def test_what_other_programs_read_as_text_is_told(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns: list[list[dict[str, object]]] = [
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "name": "c"}],
    ]
    plain, mixed = (Table("example", [{"messages": m} for m in ms]) for ms in (turns[:1], turns))
    plain.write("plain.parquet")
    mixed.write("mixed.jsonl")
    mixed.save("saved")
    assert capsys.readouterr().err == ""
    assert Table.read(mixed.write("mixed.parquet")).key == mixed.key
    said = capsys.readouterr().err
    assert "mixed.parquet: to other programs these columns are JSON text: messages." in said


def test_json_lines_are_json(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"score": float("nan"), "scores": [1.0, float("-inf")]}, {"score": 2.0}]

    def none(word: str) -> None:
        pytest.fail(f"JSON has no {word}")

    Table("record", rows).write("got.jsonl")
    lines = Path("got.jsonl").read_text().splitlines()
    found = [json.loads(line, parse_constant=none) for line in lines]
    assert [(r["score"], r.get("scores")) for r in found] == [(None, [1.0, None]), (2.0, None)]
    said = capsys.readouterr().err
    assert "column 'score' of table row 1, nan is read as nothing" in said
    assert "[1.0, -inf] is read as [1.0, None]" in said and ".parquet does" in said
    assert [_told(r) for r in Table.read("got.jsonl")] == [{"scores": [1.0, None]}, {"score": 2.0}]


def test_other_peoples_csv_is_read_as_it_was(tmp_path: Path) -> None:
    text = (
        "prompt,completion,answer,zip,seen,score,margin,steps,tags,licence\n"
        '5,true,42,007,TRUE,1,,"[""a""]","[1]",MIT\n'
        '"[1, 2]",,7,010,false,0.5,2,,"[2]",\n'
    )
    first, second = _csv(tmp_path, text)
    assert first == {
        "prompt": "5", "completion": "true", "answer": 42, "zip": "007", "seen": True,
        "score": 1.0, "steps": ["a"], "tags": "[1]", "licence": "MIT",
    }  # fmt: skip
    assert second == {
        "prompt": "[1, 2]", "completion": "", "answer": 7, "zip": "010", "seen": False,
        "score": 0.5, "margin": 2.0, "tags": "[2]", "licence": "",
    }  # fmt: skip
    with pytest.raises(InputError, match=r"row 3: field 'margin' must be a number.*cell empty"):
        _csv(tmp_path, "text,margin\na,1\nb,much\n")
    with pytest.raises(InputError, match=r"row 3: field 'scores' must be list \(seen: '\[1'\)"):
        _csv(tmp_path, 'prompt,completions,scores\na,"[""b""]",[1]\na,"[""b""]",[1\n')


def test_images_as_the_hub_has_them_are_kept(tmp_path: Path) -> None:
    shown = [{"bytes": b"\x89PNG", "path": None}, {"bytes": b"", "path": "b.png"}]
    table = Table("record", [{"image": image, "text": "a"} for image in shown])
    table.save(tmp_path / "saved")
    assert Table.load(tmp_path / "saved").key == table.key
    assert Table.read(table.write(tmp_path / "t.parquet")).rows == table.rows
    with pytest.raises(InputError, match=r"'image' holds what JSON cannot.*Write .parquet"):
        table.write(tmp_path / "t.csv")
    mixed = Table("record", [{"image": {"bytes": b""}}, {"image": {"path": "b.png"}}])
    for suffix in ("parquet", "dir"):
        with pytest.raises(InputError, match="column 'image' holds what no file can") as error:
            mixed.write(tmp_path / "m.parquet") if suffix == "parquet" else mixed.save(
                tmp_path / "m"
            )
        assert "Write .parquet" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "row", "said"),
    [
        ('[{"prompt": "a"}, 2]', " row 2", "a row must be a JSON object"),
        ('[{"prompt": "a"}', "", r"not valid JSON.*one object a line"),
        ('{"prompt": "a"}\n{"prompt"', " row 2", "not valid JSON"),
        ('[{"prompt": "a"}, {"prompt": 5}]', " row 2", "'prompt' must be str"),
        ("[]", "", "no rows"),
    ],
)
def test_a_json_file_names_its_faults(tmp_path: Path, text: str, row: str, said: str) -> None:
    path = tmp_path / "t.json"
    path.write_text(text)
    with pytest.raises(InputError, match=said) as error:
        Table.read(path)
    assert error.value.where == f"{path}{row}"


def test_a_json_file_is_a_list_of_rows_or_has_one_a_line(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    want = [_told(row) for row in Table.read("rows.jsonl")]
    Path("list.json").write_text("\ufeff" + json.dumps(ROWS, indent=2), encoding="utf-8")
    Path("lines.json").write_text(Path("rows.jsonl").read_text())
    for name in ("list.json", "lines.json"):
        assert [_told(row) for row in Table.read(name)] == want
        assert len(Table.read(name, limit=1)) == 1
    old = [{"instruction": "Say", "input": "x", "output": "x"}]
    Path("alpaca.json").write_text(json.dumps(old))
    assert Table.read("alpaca.json").kind == "alpaca"
    words = ["select", "sample", "--data", "alpaca.json", "--n", "1", "--json"]
    assert cli.main(words) == 0

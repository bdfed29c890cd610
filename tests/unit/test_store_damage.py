"""A store that lost bits: what is damaged is never reused, told as such, and made again."""

from __future__ import annotations

import errno
import json
import shutil
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from truing import jsontext, models, pipeline
from truing.cli import main
from truing.context import Json
from truing.errors import Damaged, InputError, OtherVersion, Unread
from truing.method import methods
from truing.models import Model, Prefix
from truing.principles import Principle, Principles
from truing.report.facts import read_metrics
from truing.reports import Measure, Report
from truing.store import Store
from truing.tables import Table

ROWS = [{"prompt": f"What is number {i} good for?"} for i in range(8)]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("TRUING_HOME", str(tmp_path / "home"))
    return Store()


def cleaned(store: Store) -> pipeline.StepResult:
    method = methods["select/near_duplicates"]
    settings = method.validate({"exact": True})
    return pipeline.perform(method, {"data": Table("prompt", ROWS)}, settings, store=store)


def test_a_readable_table_of_other_rows_is_not_reused(store: Store) -> None:
    made = cleaned(store)
    other = Table("prompt", [{"prompt": "Something else"}])
    other.save(store.root / "artefacts" / made.key[:2] / made.key / "data")
    again = cleaned(store)
    assert not again.cached and "damaged" in again.note
    assert again.artefact.key == made.artefact.key and cleaned(store).cached


def test_a_report_with_another_value_is_not_reused(store: Store) -> None:
    store.put("0" * 32, Report("gain", [Measure("gain", 0.25, 0.2, 0.3, 9)]), {})
    (path,) = store.root.rglob("report.json")
    path.write_text(path.read_text().replace("0.25", "0.75"))
    with pytest.raises(Damaged, match="not the one that was stored"):
        store.load("0" * 32)


@pytest.mark.parametrize("text", ["[]", "{", '{"schema_version": 1}', '{"schema_version": 1}x'])
def test_files_damaged_in_other_ways(store: Store, text: str) -> None:
    store.put("0" * 32, Report("gain", [Measure("gain", 0.25, 0.2, 0.3, 9)]), {})
    (path,) = store.root.rglob("report.json")
    path.write_text(text)
    with pytest.raises(Damaged):
        store.load("0" * 32)
    assert [row["key"] for row in store.verify()] == ["0" * 32] and store.keys() == []


def test_what_files_hold_is_what_is_compared(store: Store) -> None:
    rules = Principles([Principle("brief", "Be brief. ")])  # the file holds it without the blank
    store.put("1" * 32, rules, {})
    assert store.verify() == [] and store.load("1" * 32)


# Characters at which `str.splitlines` cuts, and which JSON leaves as they are.
BREAKS = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\x1dh\x1ei\r\nj"


def test_metrics_with_other_line_breaks_are_whole(store: Store, tmp_path: Path) -> None:
    wanted = [{"receipt": BREAKS}, {"step": 1}]
    store.put("2" * 32, Report("gain", [Measure("gain", 0.25, 0.2, 0.3, 9)]), {}, wanted)
    assert store.metrics("2" * 32) == wanted
    assert store.verify() == [] and store.has("2" * 32)
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(jsontext.dumps(line) + "\n" for line in wanted), encoding="utf-8")
    assert read_metrics(path) == wanted


def test_verify_drops_what_it_finds_and_lists_it(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    made = cleaned(store)
    (store.root / "artefacts" / made.key[:2] / made.key / "metrics.jsonl").write_text("{")
    capsys.readouterr()
    assert main(["store", "verify", "--json"]) == 2
    told = json.loads(capsys.readouterr().out)
    assert [row["key"] for row in told["damaged"]] == [made.key] and told["exit_code"] == 2
    assert not store.has(made.key)
    assert main(["store", "verify", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_a_base_of_several_models_is_read_once(
    store: Store, tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files are links to one; a new model on it needs no look at them, a check a single one."""
    opened, open_one = list[Path](), Path.open

    def counted(path: Path, *args: Any, **how: Any) -> Any:
        opened.extend([path] if path.name == "model.safetensors" else [])
        return open_one(path, *args, **how)

    prefixes = [Prefix([{"role": "user", "content": text}]) for text in "ab"]
    made = [Model.open(tiny_path).adding(prefix) for prefix in prefixes]
    store.put("1" * 32, made[0], {})
    monkeypatch.setattr(Path, "open", counted)
    store.put("2" * 32, made[1], {})
    assert not opened and store.verify() == []
    assert len(opened) == 1 and len(list(store.root.rglob("model.safetensors"))) == 2


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.EMFILE, errno.ESTALE])
def test_a_fault_of_the_machine_deletes_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """What is hidden by it may be whole: a trained model must not go for a full table of files."""
    made = cleaned(store)

    def failing(folder: Path) -> Table:
        try:
            raise OSError(number, "not now")
        except OSError as error:
            raise InputError(f"not a readable Parquet file: {error}") from None

    with monkeypatch.context() as patch:
        patch.setattr(Table, "load", failing)
        with pytest.raises(Unread, match="left as it is"):
            store.verify()
        with pytest.raises(Unread):
            cleaned(store)
    assert store.has(made.key) and cleaned(store).cached


def test_what_another_version_wrote_is_left(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    made = cleaned(store)

    def newer(folder: Path) -> Table:
        raise OtherVersion("written by a newer version")

    monkeypatch.setattr(Table, "load", newer)
    assert store.verify() == [] and store.has(made.key)


def test_kinds_of_another_version_are_left(store: Store, tiny_path: Path) -> None:
    prefix = Prefix([{"role": "user", "content": "a"}])
    store.put("1" * 32, Model.open(tiny_path).adding(prefix), {})
    store.put("2" * 32, Table("text", [{"text": "a"}]), {})
    (path,) = store.root.rglob("model.json")
    path.write_text(path.read_text().replace('"prefix"', '"suffix"'))
    with pytest.raises(OtherVersion, match="unknown change 'suffix'"):
        store.load("1" * 32)
    (path,) = store.root.rglob("table.parquet")
    data = pq.read_table(path)
    meta = {**data.schema.metadata, b"truing.kind": b"haiku"}
    pq.write_table(data.replace_schema_metadata(meta), path)
    assert store.verify() == [] and len(store.keys()) == 2


def picky(tiny_path: Path) -> Model:
    rules = Principles([Principle("brief", "Be brief.", check={"use": "max_words", "n": 4})])
    made = methods["best_of_n"](Model.open(tiny_path), rules, n=2)
    assert isinstance(made, Model)
    return made


def test_what_a_change_holds_is_checked_when_it_is_read(
    store: Store, tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = picky(tiny_path)
    made.save(tmp_path / "saved")
    (place,) = (tmp_path / "saved" / "held").iterdir()
    (place / "principles.json").write_text(
        (place / "principles.json").read_text().replace("Be brief", "Be verbose")
    )
    monkeypatch.setattr(models, "_held", {})
    Model.load(tmp_path / "saved")
    with pytest.raises(InputError, match="not the one that was saved"):
        models.held(place.name)


def test_what_a_change_holds_is_checked_in_the_store(store: Store, tiny_path: Path) -> None:
    store.put("2" * 32, picky(tiny_path), {})
    assert store.verify() == []
    (path,) = store.root.rglob("principles.json")
    path.write_text(path.read_text().replace("Be brief", "Be verbose"))
    with pytest.raises(Damaged, match="a change holds"):
        store.load("2" * 32)
    assert len(store.verify()) == 1 and store.keys() == []


def test_a_held_artefact_whose_folder_is_gone_is_read_from_another(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = picky(tiny_path)
    for name in ("one", "two"):
        made.save(tmp_path / name)
    monkeypatch.setattr(models, "_held", {})
    Model.load(tmp_path / "one")
    shutil.rmtree(tmp_path / "one")
    Model.load(tmp_path / "two")
    (place,) = (tmp_path / "two" / "held").iterdir()
    assert models.held(place.name).key == place.name


def test_gc_removes_what_kills_left_beside_artefacts(store: Store) -> None:
    made = cleaned(store)
    store.roots.keep_recent(made.key)
    folder = store.root / "artefacts" / made.key[:2]
    left = [folder / f".{made.key}.gone", folder / f".{made.key}.8xk2", folder / ".ab.12"]
    for path in left:
        path.mkdir()
        (path / "artefact.json").write_text("{}")
    with store.lock("ab"):  # its step is at work
        gone = store.gc(days=1)
    assert [g["deleted"] for g in gone].count("remains") == 2
    assert [p.exists() for p in left] == [False, False, True]


def test_what_lies_in_a_container_s_image_is_discarded(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folders take no other name: the file that tells an artefact goes first."""
    made = cleaned(store)
    remove, there = shutil.rmtree, list[bool]()

    def denied(path: Path, to: Path) -> Path:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    def noted(path: Path, **how: Any) -> None:
        there.append(store.has(made.key))
        remove(path, **how)

    monkeypatch.setattr(Path, "rename", denied)
    monkeypatch.setattr(shutil, "rmtree", noted)
    store.discard(made.key)
    assert there == [True, False, False] and not store._place(made.key).exists()


def test_gc_reads_what_runs_refer_to_once_and_sees_a_run_that_begins_meanwhile(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in (keys := [f"{i:032x}" for i in range(6)]):
        store.put(key, Table("text", [{"text": key}]), {})
    for i in range(3):
        (folder := tmp_path / f"run{i}").mkdir()
        (folder / "manifest.json").write_text("{}")
        store.roots.keep_run(folder, [keys[0]])
    read, lock, files_read = json.loads, store.lock, 0

    def counted(text: str) -> object:
        nonlocal files_read
        files_read += "folder" in text
        return read(text)

    def locked(key: str, *, wait: bool = True) -> AbstractContextManager[bool]:
        if key == keys[2]:  # a run takes it up just before gc looks at it
            store.roots.keep_run(tmp_path / "run1", [keys[2]])
        return lock(key, wait=wait)

    monkeypatch.setattr(store, "lock", locked)
    monkeypatch.setattr("truing.store.json.loads", counted)
    gone = {str(g["key"]) for g in store.gc(days=0) if g["deleted"] == "artefact"}
    assert gone == {k for k in keys if k not in (keys[0], keys[2])}
    assert files_read <= 3 + 2  # each once, and the one that was written once more


def test_what_is_known_of_an_artefact_is_read_once(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, facts, read = cleaned(store), store.facts, list[str]()

    def counted(key: str) -> dict[str, Json]:
        read.append(key)
        return facts(key)

    monkeypatch.setattr(store, "facts", counted)
    assert isinstance(store.load(made.key), Table)
    assert read == [made.key]


def test_an_export_refuses_folders_of_others(store: Store, tmp_path: Path) -> None:
    made = cleaned(store)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(InputError, match="holds other files"):
        store.export(made.key, str(tmp_path / "thesis"))
    with pytest.raises(InputError, match="a file is in the place"):
        store.export(made.key, str(tmp_path / "thesis" / "chapter.tex"))
    for _ in range(2):
        store.export(made.key, str(tmp_path / "new"))
    assert [p.name for p in (tmp_path / "thesis").iterdir()] == ["chapter.tex"]


@pytest.mark.parametrize("text", ['{"schema_version": 1}', '{"schema_version": 1, "base": 3}'])
def test_a_card_that_lacks_what_it_must_hold(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.json").write_text(text)
    with pytest.raises(InputError, match="card of the model is damaged"):
        Model.load(tmp_path)


@pytest.mark.parametrize("text", ["[]", "{", '{"folder": 3, "keys": []}'])
def test_a_root_that_cannot_be_read(store: Store, tmp_path: Path, text: str) -> None:
    made = cleaned(store)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "manifest.json").write_text("{}")
    store.roots.keep_run(tmp_path / "run", [made.key])
    (path,) = (store.root / "roots").iterdir()
    path.write_text(text)
    with pytest.raises(InputError, match="what a run refers to cannot be read"):
        store.gc()
    assert store.has(made.key)
    store.roots.keep_run(tmp_path / "run", [made.key])
    assert store.gc() == []

"""Sets that are not at hand, what the catalogue counts, and a mirror's index of a wrong form."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from truing import cli, dataindex, datasets, pipeline
from truing.core.modelfiles.licences import forbids_commercial
from truing.dataset_rows import SHAPES
from truing.errors import InputError
from truing.mirrored import MIRRORED
from truing.plan import Plan
from truing.store import Store
from truing.tables import Table


@pytest.mark.parametrize(
    "name", ["hh_rlhf", "hh_rlhf/helpful-base.test", "survival", "survival/gbsg2", "text_corpora"]
)
def test_an_absent_set_says_where_it_has_to_be(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRUING_DATA", raising=False)
    with pytest.raises(InputError, match="is not here") as error:
        Table.read(name)
    assert error.value.fix.startswith("Set TRUING_DATA to a folder")
    assert datasets.knows(name)
    listed = {str(d["name"]): d for d in datasets.catalogue()}[name.partition("/")[0]]
    assert not listed["present"] and listed["records"] is None
    assert listed["source"] and str(listed["source"]) in error.value.fix and listed["licence"]


def test_every_set_that_is_known_by_name_is_described() -> None:
    """Each file that has a shape is among its set's, and the page has each set."""
    assert set(MIRRORED) == datasets._mirror_names() - set(dataindex.OWN)
    for key in SHAPES:
        name, _, part = key.partition("/")
        if name in MIRRORED:
            assert part in {file.rpartition(".")[0] for file in MIRRORED[name].files}, key
    page = (Path(__file__).parents[2] / "docs" / "data-and-models.md").read_text()
    for name, one in MIRRORED.items():
        assert f"| `{name}` | {one.origin} | {one.licence} |" in page


def test_shipped_sets_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRUING_DATA", raising=False)
    listed = {d["name"]: d for d in datasets.catalogue() if d["present"]}
    assert listed["prose"]["records"] == 26
    for name, facts in listed.items():
        assert facts["records"] == len(Table.read(str(name)))


GOOD = {"name": "a", "title": "A", "licence": "MIT", "files": [{"file": "a.jsonl"}]}


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ({"sets": 3}, "index.json: an index must be a list of sets"),
        ([1], "index.json set 1: a set must be a mapping (seen: 1)"),
        ([GOOD, GOOD | {"name": None}], "index.json set 2: 'name' must be a text"),
        ([GOOD | {"files": 3}], "index.json set 1: 'files' must list {file: name} (seen: 3)"),
        ([GOOD | {"files": [{"path": "a"}]}], "'files' must list {file: name}"),
        ([GOOD | {"files": [{"file": "a", "records": "x"}]}], "'files' must list {file: name}"),
        (
            [GOOD | {"files": [{"file": "a", "sha256": "abc"}]}],
            "set 1 file a: 'sha256' must be 64 hexadecimal digits (seen: 'abc')",
        ),
        ([GOOD | {"non_commercial": "no"}], "'non_commercial' must be true or false"),
        ([GOOD | {"origin": 3}], "set 1: 'origin' must be a text or a list of {source, version}"),
        ([GOOD | {"origin": ["x"]}], "'origin' must be a text or a list of {source, version}"),
        ([GOOD | {"origin": [{"version": "1"}]}], "'origin' must be a text or a list of"),
    ],
)
def test_an_index_of_another_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, index: object, said: str
) -> None:
    monkeypatch.setenv("TRUING_DATA", str(tmp_path))
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(InputError) as error:
        datasets.catalogue()
    assert said in str(error.value) and "[{name, title, licence, files" in error.value.fix


def test_an_index_in_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUING_DATA", str(tmp_path))
    (tmp_path / "index.json").write_text(json.dumps([GOOD]))
    assert datasets.sets()["a"].origin == "TRUING_DATA"


@pytest.mark.parametrize("checksum", ["", "0" * 64])
def test_a_set_without_a_checksum_is_shown_as_such(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    checksum: str,
) -> None:
    monkeypatch.setenv("TRUING_DATA", str(tmp_path))
    files = [{"file": "a.jsonl", "sha256": checksum}]
    (tmp_path / "index.json").write_text(json.dumps([GOOD | {"files": files}]))
    (tmp_path / "a").mkdir()
    (tmp_path / "a/a.jsonl").write_text('{"prompt": "Why?"}\n')
    assert cli.main(["data"]) == 0
    (line,) = (x for x in capsys.readouterr().out.splitlines() if x.startswith("  a "))
    assert ("MIT, no checksum" in line) is (not checksum)


def test_a_shipped_set_without_a_checkout_says_where_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRUING_DATA", raising=False)
    shipped = {s.name for s in dataindex.sets().values()}
    kinds = {str(d["name"]): d["kind"] for d in datasets.catalogue() if d["present"]}
    assert set(dataindex.OWN) == shipped
    assert dataindex.OWN == kinds
    monkeypatch.setattr(dataindex, "repository", lambda: None)
    for name in dataindex.OWN:
        assert datasets.knows(name) and datasets.knows(f"{name}/{name}")
        with pytest.raises(InputError, match="is not here") as error:
            Table.read(name)
        assert error.value.fix.startswith("Install a checkout of truing's repository")
        assert "pip install -e ." in error.value.fix
    listed = {str(d["name"]): d for d in datasets.catalogue()}
    assert not listed["prose"]["present"] and "pip install -e ." in str(listed["prose"]["about"])


def test_a_plan_without_a_checkout_names_the_set_and_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRUING_DATA", raising=False)
    monkeypatch.setattr(dataindex, "repository", lambda: None)
    plan = Plan("r", folder=tmp_path)
    plan.step("some", "select/sample", data="everyday_prompts", n=1)
    with pytest.raises(
        InputError, match=r"step some.*'everyday_prompts' is not here.*pip install -e"
    ):
        pipeline.run(plan, tmp_path / "runs", store=Store(tmp_path / "store"))


ROWS = b'{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": "c"}\n'
Folder = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    """A data folder of one set, "asked", whose index says what a test has it say."""
    monkeypatch.setattr(datasets, "_warned", set())
    monkeypatch.setenv("TRUING_DATA", str(tmp_path / "data"))

    def make(**facts: object) -> Path:
        digest = hashlib.sha256(ROWS).hexdigest()
        entry = {"name": "asked", "title": "Questions", "licence": "MIT (repository)."}
        entry |= {"files": [{"file": "asked.jsonl", "sha256": digest, "records": 3}], **facts}
        path = tmp_path / "data" / "asked" / "asked.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(ROWS)
        (tmp_path / "data" / "index.json").write_text(json.dumps([entry]))
        return path

    return make


def test_data_says_source_licence_and_rows(
    folder: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    origin = [{"source": "someone/questions", "version": "5e69c50"}, {"source": "own words"}]
    folder(origin=origin)
    assert cli.main(["data", "--json"]) == 0
    (told,) = [d for d in json.loads(capsys.readouterr().out) if d["name"] == "asked"]
    assert told == {
        "name": "asked", "kind": "prompt", "present": True, "licence": "MIT", "checked": True,
        "licence_text": "MIT (repository)", "about": "Questions", "origin": "TRUING_DATA",
        "source": "someone/questions 5e69c50, own words", "parts": ["asked"], "records": 3,
    }  # fmt: skip
    assert cli.main(["data"]) == 0
    lines = capsys.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.split()[:1] == ["asked"])
    assert lines[at].split() == ["asked", "prompt", "present", "3", "rows", "MIT", "Questions"]
    assert lines[at + 1].strip() == "from someone/questions 5e69c50, own words"
    # Of the shipped sets it is known as well, and what an index leaves out is left out.
    assert any(line.strip().startswith("from Written for this repository") for line in lines)
    folder(origin=" some\n words ", files=[{"file": "asked.jsonl"}])
    (told,) = [d for d in datasets.catalogue() if d["name"] == "asked"]
    assert told["source"] == "some words" and not told["checked"] and told["records"] is None


@pytest.mark.parametrize("by_path", [False, True])
def test_a_file_that_is_not_the_listed_one_is_one_message(
    by_path: bool, folder: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder()
    data = str(path) if by_path else "asked"
    words = ["select", "sample", "--data", data, "--n", "1", "--json"]
    path.write_bytes(ROWS + b"half a ro")  # nor is it told that its last row is none
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    line = json.loads(out)
    assert line["exit_code"] == 2 and "wrong checksum" in line["error"]
    assert str(path) in line["error"] and "Fetch the data again" in line["error"]
    assert len([e for e in err.splitlines() if e.startswith("truing: ")]) == 1
    path.write_bytes(ROWS)
    assert cli.main(words) == 0
    capsys.readouterr()
    path.unlink()
    assert cli.main(words) == 2 and "asked.jsonl" in capsys.readouterr().out


def test_a_file_given_by_its_path_has_the_licence_of_its_set(
    folder: Folder, tmp_path: Path
) -> None:
    path = folder(licence="CC BY-NC 4.0")
    by_path, by_name = Table.read(path), Table.read("asked")
    assert [r["id"] for r in by_path] == [r["id"] for r in by_name]
    assert by_path[2]["lineage"] == {"source": "asked/asked", "licence": "CC BY-NC 4.0"}
    assert datasets.licence_of([by_path]) == "CC BY-NC 4.0"
    elsewhere = tmp_path / "other.jsonl"
    elsewhere.write_bytes(ROWS)
    assert Table.read(elsewhere)[0]["lineage"] == {}
    other = path.with_name("not_listed.jsonl")
    other.write_bytes(ROWS)
    assert Table.read(other)[0]["lineage"] == {}


@pytest.mark.parametrize(
    ("licence", "marked", "warns"),
    [
        ("MIT (repository).", False, False),
        ("CC BY-NC-SA 4.0.", False, True),
        ("Apache-2.0 code; prompts as their sources say", True, True),
        ("Published for free research use by its organisers", False, True),
        ("Research purposes only, by agreement", False, True),
        ("Apache-2.0 (repository; data of Google Research).", False, False),
        ("No licence file in the repository", False, False),
    ],
)
def test_a_set_that_is_not_for_commerce_is_warned_of_where_it_is_used(
    licence: str, marked: bool, warns: bool, folder: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder(licence=licence, non_commercial=marked)
    datasets.catalogue()
    assert capsys.readouterr().err == ""  # listing is no use
    for source in ("asked", str(path), "asked"):
        Table.read(source)
    said = capsys.readouterr().err
    assert said.count("truing: warning: the data set 'asked' is for research") == warns
    assert not warns or licence.rstrip(".") in said
    assert forbids_commercial(licence) is (warns and not marked)

"""Sets that are not at hand, what the catalogue counts, and a mirror's index of a wrong form."""

import json
from pathlib import Path

import pytest

from truing import dataindex, datasets, pipeline
from truing.errors import InputError
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

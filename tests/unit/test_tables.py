"""Tables: rows are looked at where they enter, once; and are called by where they came from."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from truing import tables
from truing.errors import InputError
from truing.pipeline import run
from truing.plan import Plan
from truing.select.checked import checked
from truing.select.deita import deita
from truing.select.sample import sample
from truing.tables import Table

HALF, WHOLE = "caf\u00e9 \ud83d", "caf\u00e9 \ufffd"


def _pairs(n: int) -> Table:
    return Table("pair", [{"prompt": f"q{i}", "chosen": "a", "rejected": "b"} for i in range(n)])


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often a row, or something of it, was looked at, by the function that did."""
    seen: Counter[str] = Counter()

    def counted(name: str) -> Callable[..., object]:
        real = getattr(tables, name)

        def look(*args: object) -> object:
            seen[name] += 1
            return real(*args)

        return look

    for name in ("mended", "check_row", "row_id"):
        monkeypatch.setattr(tables, name, counted(name))
    return seen


def test_rows_are_looked_at_where_they_enter_and_no_more(looks: Counter[str]) -> None:
    table = _pairs(50)
    assert looks == {"mended": 50, "check_row": 50, "row_id": 50}
    looks.clear()
    kept = table.where(lambda row: row["prompt"] != "q7").take(range(40))
    left, rest = kept.split(10)
    assert (len(left), len(rest)) == (10, 30) and not looks
    marked = rest.with_lineage(filter="x", judge=HALF)
    assert looks == {"mended": 1}  # the facts, not the rows
    assert marked[0]["lineage"] == {"filters": ["x"], "judge": WHOLE}
    looks.clear()
    assert table.expect("prompt").kind == "prompt" and looks == {"check_row": 50}
    looks.clear()
    made = table.map(lambda row: row | {"chosen": f"{row['prompt']} {HALF}"})
    # Of each row the new column alone is mended; the names of columns are.
    assert made[3]["chosen"] == f"q3 {WHOLE}" and looks["row_id"] == 50
    looks.clear()
    sample(table, n=5)
    checked(table, checks=[{"use": "min_words", "n": 1}])
    assert set(looks) == {"mended"} and looks["mended"] == 2


def test_a_derived_table_has_rows_of_its_own() -> None:
    table = _pairs(3)
    for made in (table.take([1]), table.split(2)[0], table.where(lambda row: True)):
        made.rows[0]["chosen"] = "changed"
    assert [row["chosen"] for row in table] == ["a"] * 3
    with pytest.raises(InputError, match="kind of table"):
        table.map(lambda row: row, "no_such_kind")


def test_what_a_change_breaks_is_told_by_its_row(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('\n{"prompt": "a"}\n\n{"prompt": "b"}\n')
    table = Table.read(path)
    with pytest.raises(InputError) as error:
        table.map(lambda row: row | {"prompt": row["prompt"] if row["prompt"] == "a" else 3})
    assert error.value.where == f"{path} row 4"
    with pytest.raises(InputError) as error:
        table.remade("prompt", [{"prompt": "x"}, {"prompt": 1}], [0, 1])
    assert error.value.where == f"{path} row 4"


def test_selections_name_rows_by_the_file(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    rows = [{"prompt": f"Say {i}.", "completion": "x" * (i + 1), "final": 1.0} for i in range(4)]
    rows[2]["final"] = "no number"
    path.write_text("".join(f"\n{json.dumps(r)}\n" for r in rows))
    table = Table.read(path)
    for made in (sample(table, n=3, part="sample"), deita(table, m=3, tau=1.0)):
        lines = [2 * int(str(row["prompt"])[4:-1]) + 2 for row in made]
        assert [made.number(i) for i in range(3)] == lines
    column: dict[str, object] = {"use": "column", "name": "final"}
    with pytest.raises(InputError, match="'final' must hold numbers") as error:
        deita(table.take([3, 2]), complexity=column)
    assert error.value.where == f"scorer column {path} row 6"


def test_rows_from_the_store_are_named_by_the_file(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    rows = [{"prompt": f"Say {i}.", "completion": "x", "instruct_reward": 5.0} for i in range(6)]
    rows[4]["instruct_reward"] = "five"
    path.write_text("".join(f"\n{json.dumps(r)}\n" for r in rows))
    plan = Plan("rows", folder=tmp_path)
    plan.step("rest", "select/sample", data=str(path), n=1, seed=1)
    plan.step("some", "select/sample", data=str(path), n=1, part="rest", seed=1)
    plan.step("good", "select/magpie_filter", data="some")
    with pytest.raises(InputError) as error:
        run(plan, tmp_path / "runs")
    assert error.value.where.endswith(f"step good: {path} row 10")


def test_rows_that_were_made_name_those_they_came_from(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('\n{"prompt": "a"}\n\n{"prompt": "b"}\n')
    asked = Table.read(path)

    def stored(table: Table) -> Table:
        return Table.load(table.save(tmp_path / "kept").parent)

    made = Table(
        "example",
        [
            {"prompt": "b", "completion": "x", "lineage": {"parents": [asked[1]["id"]]}},
            {"prompt": "c", "completion": "y"},
        ],
    )
    answers = stored(made).made_in("answers", [asked])
    assert answers.place(0) == f"step answers row 1, from {path} row 4"
    assert answers.place(1) == "step answers row 2"
    kept = stored(answers.take([0])).made_in("kept", [asked, answers])
    assert kept.place(0) == answers.place(0)
    again = stored(kept.map(lambda row: row | {"completion": "z"})).made_in("z", [asked, answers])
    assert again.place(0) == f"step z row 1, from step answers row 1, from {path} row 4"
    # What is derived from it is called alike, though its rows have other ids.
    changed = again.map(lambda row: row | {"completion": "u"})
    assert changed.take([0]).place(0) == again.place(0)


def test_rows_are_named_by_the_file_that_they_came_from_and_no_other() -> None:
    prompts = Table("prompt", [{"prompt": "a", "id": 1}, {"prompt": "b", "id": 2}], where="p.jsonl")
    pair = {"prompt": "c", "chosen": "d", "rejected": "e", "id": 2}
    pairs = Table("pair", [pair], where="q.jsonl", numbers=[9])
    kept = pairs.take([0]).made_in("kept", [prompts, pairs])
    assert kept.place(0) == "q.jsonl row 9"
    # A changed row may be that of either file, unless its step was given one of them.
    changed = Table("pair", [pair | {"chosen": "f"}])
    assert changed.made_in("s", [prompts, pairs]).place(0) == "step s row 1"
    assert changed.made_in("s", [pairs]).place(0) == "step s row 1, from q.jsonl row 9"
    twice = Table("prompt", [{"prompt": "a", "lineage": {"parents": ["2"]}}])
    assert twice.made_in("t", [prompts, pairs]).place(0) == "step t row 1"
    images = Table("record", [{"image": np.eye(2) * k, "id": "x"} for k in (1, 2)], where="i.npz")
    assert images.take([1]).made_in("u", [images]).place(0) == "i.npz row 2"


def test_a_pickle_leaves_behind_what_a_table_was_made_from() -> None:
    """Else each process that helps to train is sent every table of the run."""
    read = Table("prompt", [{"prompt": "x" * 10_000}, {"prompt": "y"}], where="a", numbers=(7, 9))
    made = Table("prompt", [read[1]]).made_in("next", [read])
    both, here = Table.joined([made, made]), "step next row 1"
    for table, place in ((made, here), (both, here), (read.take([1]), "a row 9")):
        sent = pickle.dumps(table)
        again = pickle.loads(sent)
        assert len(sent) < 2000 and again.key == table.key and again.place(0) == place
    assert made.place(0) == "a row 9"


def test_rows_of_others_are_not_named_as_those_of_a_table() -> None:
    table = Table("prompt", [{"prompt": "a"}], where="t.jsonl", numbers=[5])
    for where, wanted in {
        "check row 1": "check t.jsonl row 5", "row 2": "row 2", "other row 0": "other row 0",
    }.items():  # fmt: skip
        with pytest.raises(InputError, match="bad") as error, table.naming():
            raise InputError("bad", where=where)
        assert error.value.where == wanted
    with pytest.raises(InputError, match="bad") as error, table.naming([0, 0]):
        raise InputError("bad", where="row 2")
    assert error.value.where == "t.jsonl row 5"


@pytest.mark.parametrize("name", ["t.jsonl", "t.parquet"])
def test_a_row_made_twice_is_read_as_it_was_written(name: str, tmp_path: Path) -> None:
    asked = Table("prompt", [{"prompt": "a", "x": 1}, {"prompt": "a", "x": 2}])
    made = asked.map(lambda row: {"prompt": row["prompt"]})
    assert made[0]["id"] == made[1]["id"] and made[0]["lineage"] != made[1]["lineage"]
    found = Table.read(made.write(tmp_path / name))
    assert found.rows == made.rows


def test_ids_that_begin_anew_in_each_table_are_told_apart() -> None:
    def shard(*prompts: str) -> Table:
        return Table("prompt", [{"id": str(i), "prompt": p} for i, p in enumerate(prompts)])

    first, second = shard("a", "b", "c"), shard("d", "b")  # of which one row is there twice
    made = Table.joined([first, second, shard("e")])
    assert [(r["id"], r["prompt"]) for r in made] == [
        ("0", "a"), ("1", "b"), ("2", "c"), ("0/2", "d"), ("1", "b"), ("0/3", "e")
    ]  # fmt: skip
    assert [r["id"] for r in second] == ["0", "1"] and made.place(3) == second.place(0)
    plain = [Table("prompt", [{"prompt": p}]) for p in "ab"]
    assert [r["id"] for r in Table.joined(plain)] == [t[0]["id"] for t in plain]

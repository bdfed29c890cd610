"""What must hold for any table, principles file and settings, on drawn examples."""

from __future__ import annotations

import contextlib
import csv
import functools
import gzip
import io
import itertools
import json
import math
import tempfile
import types
import typing
from datetime import datetime
from decimal import Decimal
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from truing import tablewriting
from truing.core.batch.by_length import batches
from truing.errors import InputError
from truing.method import methods
from truing.principles import Principle, Principles
from truing.signature import Setting
from truing.tables import KINDS, Row, Table, content_hash, row_id

few = settings(
    max_examples=40,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)

scalars = st.one_of(
    st.text(max_size=12),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
)
plain = st.recursive(
    st.one_of(st.none(), scalars),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
names = st.text("abcé_-. 7", min_size=1, max_size=6).filter(lambda n: n not in ("id", "lineage"))
messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": st.text()}),
    min_size=1,
    max_size=3,
)
prompts = st.one_of(st.text(max_size=20), messages)
ROWS: dict[str, st.SearchStrategy[Row]] = {
    "record": st.dictionaries(names, plain, max_size=4),
    "pair": st.fixed_dictionaries({"prompt": prompts, "chosen": st.text(), "rejected": st.text()}),
    "group": st.fixed_dictionaries(
        {
            "prompt": prompts,
            "completions": st.lists(st.text(max_size=5), max_size=3),
            "scores": st.lists(
                st.one_of(st.integers(-3, 3), st.floats(allow_nan=False, allow_infinity=False)),
                max_size=3,
            ),
        }
    ),
    "trajectory": st.fixed_dictionaries(
        {"turns": st.lists(st.dictionaries(st.text(max_size=3), plain, max_size=3), max_size=3)}
    ),
    "example": st.fixed_dictionaries({"messages": messages}),
}
tables = st.one_of(
    *(st.tuples(st.just(kind), st.lists(rows, max_size=5)) for kind, rows in ROWS.items())
)


@few
@given(tables)
def test_tables_come_back_from_parquet(made: tuple[str, list[Row]]) -> None:
    table = Table(*made)
    with tempfile.TemporaryDirectory() as folder:
        table.save(folder)
        again = Table.load(folder)
    assert again.kind == table.kind and len(again) == len(table)
    assert again.rows == table.rows
    assert again.key == table.key
    assert [row_id(r) for r in again] == [r["id"] for r in table]


@few
@given(tables.filter(lambda t: bool(t[1])), st.booleans())
def test_tables_come_back_from_json_lines(made: tuple[str, list[Row]], packed: bool) -> None:
    table = Table(*made)
    with tempfile.TemporaryDirectory() as folder:
        path = table.write(Path(folder) / "t.jsonl")
        if packed:
            path = Path(folder) / "t.jsonl.gz"
            path.write_bytes(gzip.compress((Path(folder) / "t.jsonl").read_bytes()))
        again = Table.read(path, table.kind)
        assert len(list(Path(folder).iterdir())) == 1 + packed
    assert again.rows == table.rows and again.key == table.key


@few
@given(st.lists(st.fixed_dictionaries({"prompt": st.text(), "completion": st.text()}), min_size=1))
def test_tables_come_back_from_csv(rows: list[dict[str, str]]) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["prompt", "completion"])
    writer.writeheader()
    writer.writerows(rows)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t.csv"
        path.write_bytes(text.getvalue().encode())
        again = Table.read(path)
    table = Table("example", rows)
    assert again.kind == "example" and again.key == table.key


numbers = st.one_of(st.integers(-(2**70), 2**70), st.floats(allow_nan=False, allow_infinity=False))
liked = st.fixed_dictionaries(
    {"prompt": prompts, "chosen": st.text(), "rejected": st.text()},
    optional={
        "margin": st.floats(allow_nan=False, allow_infinity=False),
        "chosen_finished": st.booleans(),
        "tokens": st.integers(-(2**70), 2**70),
        "mixed": numbers,
        "scores": st.lists(numbers, max_size=3),
        "lineage": st.fixed_dictionaries({"licence": st.sampled_from(["MIT", "CC BY-SA 4.0"])}),
    },
)


def written(table: Table, path: Path) -> str:
    """What is said while a table is written."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        table.write(path)
    return said.getvalue()


@few
@given(st.lists(liked, min_size=1, max_size=5))
def test_what_a_csv_can_hold_comes_back_and_nothing_is_said(rows: list[Row]) -> None:
    table = Table("pair", rows)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t.csv"
        assert written(table, path) == ""
        again = Table.read(path)
    assert again.kind == "pair" and again.rows == table.rows and again.key == table.key


odder = st.one_of(plain, st.floats(), st.lists(st.floats(), max_size=2), st.sampled_from(
    ["", "7", "-1e5", "007", "true", "False", "[1]", "nan", '{"a": 1}', '[{"role": "user"}]']
))  # fmt: skip
unruly = st.dictionaries(
    st.one_of(names, st.sampled_from(["prompt", "text", "task", "steps", "tools"])),
    odder, max_size=4,
)  # fmt: skip


@few
@given(st.lists(unruly, min_size=1, max_size=4), st.sampled_from([".csv", ".jsonl"]))
def test_a_value_comes_back_or_its_column_is_named(rows: list[Row], suffix: str) -> None:
    table = Table("record", rows)
    with (
        tempfile.TemporaryDirectory() as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(tablewriting, "SHOWN", 99)
        path = Path(folder) / f"t{suffix}"
        said = written(table, path)
        again = Table.read(path, "record")
    assert len(again) == len(table)
    for row, found in zip(table, again, strict=True):
        for name in row.keys() | found.keys():
            if content_hash(row.get(name)) != content_hash(found.get(name)):
                assert f"column {name!r} of table row" in said, (row, found)


def test_columns_of_other_libraries_are_kept(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    values = {"at": [datetime(2026, 1, 2), None], "cost": [Decimal("1.50")] * 2, "raw": [b"a", b""]}
    pq.write_table(pa.table({"text": ["a", "b"], **values}), tmp_path / "t.parquet")
    table = Table.read(tmp_path / "t.parquet")
    assert table[0]["at"] == datetime(2026, 1, 2) and "at" not in table[1]
    table.save(tmp_path / "again")
    assert Table.load(tmp_path / "again").key == table.key
    with pytest.raises(InputError, match=r"'cost' holds what JSON cannot.*Write \.parquet"):
        table.write(tmp_path / "t.jsonl")
    assert {p.name for p in tmp_path.iterdir()} == {"t.parquet", "again"}


def test_times_finer_than_python_has_them(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def read(*times: int) -> Table:
        pq.write_table(
            pa.table({"at": pa.array(times, pa.timestamp("ns"))}), tmp_path / "t.parquet"
        )
        return Table.read(tmp_path / "t.parquet")

    assert read(1_000, 2_000).column("at")[0] == datetime(1970, 1, 1, 0, 0, 0, 1)
    with pytest.raises(InputError, match=r"column 'at' cannot be read.*Round its times"):
        read(1_000, 2_001)


@few
@given(ROWS["record"], st.randoms())
def test_ids_are_of_the_content(row: Row, random: typing.Any) -> None:
    items = list(row.items())
    random.shuffle(items)
    one, other = Table("record", [row])[0], Table("record", [dict(items)])[0]
    assert one["id"] == other["id"]
    assert Table("record", [{**row, "lineage": {"step": "x"}}])[0]["id"] == one["id"]
    assert Table("record", [{**row, "one more": 1}])[0]["id"] != one["id"]


wrong = {str: [1, None, ["a"], {}], list: ["a", 1, None], bool: [2, "x", None, 0.5]}


@few
@given(
    st.sampled_from(["pair", "unpaired", "group", "steps", "trajectory", "text"]),
    st.integers(0, 6),
    st.data(),
)
def test_a_faulty_row_is_named_with_its_field(kind: str, at: int, data: st.DataObject) -> None:
    need = KINDS[kind][0]
    good: Row = {
        n: "x" if str in kinds else True if bool in kinds else [] for n, kinds in need.items()
    }
    field = data.draw(st.sampled_from(sorted(need)))
    allowed = need[field]
    bad = data.draw(
        st.sampled_from([v for k in allowed for v in wrong[k] if not isinstance(v, allowed)])
    )
    rows = [dict(good) for _ in range(7)]
    rows[at][field] = bad
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t.jsonl"
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
        with pytest.raises(InputError) as caught:
            Table.read(path, kind)
        text = str(caught.value)
        assert str(path) in text and f"row {at + 1}:" in text and repr(field) in text
        assert len(text.splitlines()) == 1


@few
@given(
    st.binary(max_size=60), st.sampled_from([".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".parquet"])
)
def test_any_bytes_are_a_table_or_a_clear_error(content: bytes, suffix: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"t{suffix}"
        path.write_bytes(content)
        try:
            assert len(Table.read(path)) > 0
        except InputError as error:
            assert str(path) in str(error)


said = st.text(min_size=1, max_size=8).filter(lambda t: bool(t.strip()))
rules = st.builds(
    Principle,
    id=st.from_regex(r"[\w.-]{1,8}", fullmatch=True),
    text=said.map(str.strip),
    rationale=st.text(max_size=10),
    examples=st.lists(
        st.fixed_dictionaries({"prompt": st.text(max_size=4), "good": st.text(max_size=4)}),
        max_size=2,
    ).map(tuple),
    priority=st.integers(-9, 9),
    kind=st.text(max_size=5),
    check=st.one_of(st.none(), st.just({"use": "max_words", "n": 40})),
)


@few
@given(st.lists(rules, min_size=1, max_size=4, unique_by=lambda p: p.id), st.text(max_size=4))
def test_principles_come_back(items: list[Principle], version: str) -> None:
    made = Principles(items, version, "some title")
    with tempfile.TemporaryDirectory() as folder:
        made.save(folder)
        again = Principles.load(folder)
        text = yaml.safe_dump({"version": version, "principles": [p.to_json() for p in made]})
        (Path(folder) / "p.yaml").write_text(text, encoding="utf-8")
        written = Principles.read(Path(folder) / "p.yaml")
    assert again.key == made.key and again.items == made.items and again.title == made.title
    assert written.key == made.key and written.items == made.items


odd = st.recursive(
    st.one_of(st.none(), scalars, st.dates()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.one_of(st.integers(), st.sampled_from(["id", "text", "check", "use", "version"])),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=8,
)


@few
@given(st.one_of(odd, st.fixed_dictionaries({"principles": st.lists(odd, max_size=3)})))
def test_any_yaml_is_principles_or_a_clear_error(content: object) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "p.yaml"
        path.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
        try:
            assert len(Principles.read(path)) > 0
        except InputError as error:
            assert str(path) in str(error)


@few
@given(st.binary(max_size=40))
def test_any_bytes_are_principles_or_a_clear_error(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "p.yaml"
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"p\.yaml"):
            Principles.read(path)


def drawn(kind: object) -> st.SearchStrategy[object]:
    """Values of a setting's type, for the types that settings have."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    simple: dict[object, st.SearchStrategy[object]] = {
        float: st.floats(allow_nan=False, allow_infinity=False),
        int: st.integers(-(2**40), 2**40),
        bool: st.booleans(),
        str: st.text(max_size=8),
    }
    if kind in simple:
        return simple[kind]
    if origin is typing.Literal:
        return st.sampled_from(args)
    if origin in (typing.Union, types.UnionType):
        return st.one_of(
            *(drawn(a) for a in args if a is not type(None)), *([st.none()] * (type(None) in args))
        )
    if origin in (list, tuple):
        return st.lists(drawn(args[0]), max_size=3)
    if origin is dict:
        return st.dictionaries(st.text(max_size=4), drawn(args[1]), max_size=2)
    return st.nothing()


OBJECTIVES = sorted(i for i in methods if methods[i].entry.kind == "objective")


@functools.cache
def shared() -> set[str]:
    """Settings that every objective has: the engine's."""
    return set.intersection(*(set(methods[i].settings) for i in OBJECTIVES))


@pytest.mark.parametrize("name", OBJECTIVES)
@settings(few, max_examples=8)
@given(data=st.data())
def test_settings_of_objectives_round_trip_through_json(name: str, data: st.DataObject) -> None:
    method = methods[name]
    values: dict[str, object] = {}
    for setting in method.settings.values():
        if setting.name in shared() and name != OBJECTIVES[0]:
            continue  # which one of them shows for all
        strategy = drawn(setting.type)
        assert not strategy.is_empty, f"{name} {setting.name}: {setting.type}"
        values[setting.name] = data.draw(strategy, setting.name)
    checked = method.validate(values)
    assert method.validate(json.loads(json.dumps(checked))) == checked
    for key, value in checked.items():
        typed = value if method.settings[key].type is str else json.dumps(value)
        assert method.settings[key].parse(str(typed)) == value


@few
@given(st.floats(allow_nan=True))
def test_numbers_on_the_command_line(value: float) -> None:
    found = Setting("x", float, 0.0).parse(repr(value))
    assert found == value or (math.isnan(value) and math.isnan(typing.cast(float, found)))


@few
@given(st.lists(st.integers(1, 20), max_size=12), st.integers(0, 60), st.booleans())
def test_rows_go_into_batches_by_length(lengths: list[int], room: int, up: bool) -> None:
    """Each once, those of one length in their order; no batch fits the row after it."""
    made = list(batches(lengths, room, shortest_first=up))
    order = [i for batch in made for i in batch]
    assert order == sorted(range(len(lengths)), key=lambda i: lengths[i] if up else -lengths[i])

    def filled(batch: list[int]) -> int:
        return max(lengths[i] for i in batch) * len(batch)

    assert all(len(batch) == 1 or filled(batch) <= room for batch in made)
    assert all(filled([*a, b[0]]) > room for a, b in itertools.pairwise(made))

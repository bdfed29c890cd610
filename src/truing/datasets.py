"""Data sets by name: where they lie, what their licence is, how they become tables.

A name is looked up in the repository's own `data/` (small, free sets), then in the mirror that
TRUING_DATA names: a folder whose index.json lists sets, files, checksums and licences. Other
sources are said outright: "https://...#sha256=..." (downloaded once, checked) and "hub:owner/set"
(the Hugging Face hub; with "/split", "/file" or a pattern where it has several tables). `name/part`
picks one file of a set. Sets for non-commercial use are read from TRUING_DATA only.
"""

from __future__ import annotations

import gzip
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

from truing import dataindex, renaming, tablefiles
from truing.context import current
from truing.core import files, private
from truing.core.modelfiles.licences import forbids_commercial, short, strictest
from truing.dataindex import OWN, TABLES, TEXTS, DataSet, File, sets, surest
from truing.dataset_rows import DEFAULT_PART, SHAPES, passages
from truing.errors import InputError, shorten, stems, unknown
from truing.mirrored import MIRRORED
from truing.tables import Row, Table, check_row, infer_kind, row_id

# Sets of the mirror that recipes and claims name, besides those that have a shape.
NAMED = {"survival": "record", "text_corpora": "text"}
# Where a set that is not at hand is to be had.
REPOSITORY = "install a checkout of truing's repository, in which it lies: pip install -e ."
MIRROR = "set TRUING_DATA to a folder that holds it, with its index.json"


def catalogue() -> list[dict[str, object]]:
    """What `truing data` lists: name, kind, present, licence, about, parts and more of each set.

    `origin` is where it lies, `source` where it was taken from; `records` is None where the number
    of its rows is not known; `checked` is false where the index has no checksum of some file.
    Known sets that are not at hand are listed as absent.
    """
    have = sets()
    listed: list[dict[str, object]] = [
        {
            "name": s.name,
            "kind": _kind_of_set(s),
            "present": all(f.path.is_file() for f in s.files),
            "licence": short(s.licence),
            "licence_text": s.licence,
            "about": s.about,
            "origin": s.origin,
            "source": s.source,
            "checked": all(f.sha256 for f in s.files),
            "parts": [f.part for f in s.files],
            "records": sum(map(_records, s.files)) or None,
        }
        for s in have.values()
    ]
    kinds = OWN | NAMED
    for name in sorted((set(OWN) | _mirror_names()) - set(have)):
        listed.append(
            {
                "name": name,
                "kind": kinds.get(name) or SHAPES[f"{name}/{DEFAULT_PART.get(name, name)}"][0],
                "present": False,
                "licence": MIRRORED[name].licence if name in MIRRORED else "",
                "licence_text": "",
                "about": f"absent: {_place(name)}",
                "origin": "",
                "source": MIRRORED[name].origin if name in MIRRORED else "",
                "checked": False,
                "parts": [],
                "records": None,
            }
        )
    return listed


def _kind_of_set(entry: DataSet) -> str:
    """Kind of table that the bare name gives; "record" where columns are kept."""
    try:
        file = _choose(entry, "")
        key = f"{entry.name}/{file.part}"
        if key in SHAPES or not file.readable:
            return SHAPES[key][0] if key in SHAPES else "record"
        return _kind_of(next(_rows(file.path, key))[1] or {}, file)
    except (InputError, StopIteration):
        return "record"


def _mirror_names() -> set[str]:
    """Sets of the mirror that are known by name, whether or not they are at hand."""
    return {key.partition("/")[0] for key in SHAPES} | set(NAMED)


def _place(name: str) -> str:
    """What to do where a set is not at hand."""
    return REPOSITORY if name in OWN else f"{MIRROR}: {MIRRORED[name].told(name)}"


def _records(file: File) -> int:
    """Number of rows: as the index says, else counted; a shipped set has one in each line."""
    if file.records or not file.path.name.endswith((".jsonl", ".jsonl.gz", ".csv.gz")):
        return file.records
    if not file.path.is_file() or file.path.parent != dataindex.repository():
        return 0
    return sum(1 for line in _text(file.path).split("\n") if line.strip())


def knows(source: str) -> bool:
    """True when `source` is a set's name, "name/part" or an address, and not a path.

    A set that is not at hand is known as well: reading it says where it has to be.
    """
    if source.startswith(("https://", "http://", "hub:")):
        return True
    head = source.partition("/")[0]
    return head in OWN or head in _mirror_names() or head in sets()


def path(name: str) -> Path:
    """Folder of a set, or with "name/part" the checked path of one file of any format."""
    head, _, part = name.partition("/")
    entry = _find(head)
    if part:
        file = _choose(entry, part)
        _check(file, name)
        return file.path
    first = entry.files[0]
    return first.path.parents[len(Path(first.name).parts) - 1]


def _find(name: str) -> DataSet:
    known = sets()
    if name in known:
        return known[name]
    if name in OWN or name in _mirror_names():
        place = _place(name)
        raise InputError(
            f"the data set {name!r} is not here",
            where="data",
            fix=place[0].upper() + place[1:],
        )
    raise unknown("data set", name, known, where="data", near=stems(".", tablefiles.SUFFIXES))


def _choose(entry: DataSet, part: str) -> File:
    parts = {f.part: f for f in entry.files}
    wanted = part or DEFAULT_PART.get(entry.name, "")
    if not wanted:
        readable = surest((f for f in entry.files if f.readable), lambda f: f.name)
        if len(readable) == 1:
            return readable[0]
        raise InputError(
            "the set has several files" if readable else "the set holds no table",
            where=entry.name,
            seen=list(parts)[:12],
            fix=f"Say which: {entry.name}/{readable[0].part}"
            if readable
            else "Use truing.datasets.path(name) and a reader for its format",
        )
    if wanted in parts:
        return parts[wanted]
    near = [p for p in parts if p.startswith(wanted)]
    if len(near) == 1:
        return parts[near[0]]
    raise unknown("part", wanted, parts, where=entry.name)


def _check(file: File, where: str) -> None:
    if not file.path.is_file():
        fix = "Fetch the data again, or take the entry out of its index.json"
        raise InputError("the file is missing", where=str(file.path), fix=fix)
    if file.sha256 and files.sha256(file.path) != file.sha256:
        raise InputError(
            "wrong checksum: the file is not the one that the index lists",
            where=f"{where} ({file.path})",
            fix="Fetch the data again",
        )


def _text(file: Path) -> str:
    raw = file.read_bytes()
    return (gzip.decompress(raw) if file.suffix == ".gz" else raw).decode("utf-8")


def _rows(file: Path, name: str) -> Iterator[tuple[int, Row | None]]:
    """(number of the raw row, row in its shape, None where its shape leaves it out) of one file."""
    if file.name.endswith(TEXTS):
        yield from enumerate(passages(_text(file)), 1)
        return
    if name == "digits/digits":  # numbers without a header
        for i, line in enumerate(_text(file).splitlines(), 1):
            yield i, SHAPES[name][1](dict(enumerate(line.split(","))))  # pyright: ignore
        return
    shape = SHAPES[name][1] if name in SHAPES else None
    for i, raw in tablefiles.raw_rows(file):
        try:
            row = shape(raw) if shape is not None else raw
        except (KeyError, IndexError, TypeError) as error:
            raise InputError(
                f"the row has not the fields that this set should have: {error}",
                where=f"{file} row {i}",
                seen=sorted(raw),
                fix="Give the path of the file, which reads its columns as they are",
            ) from None
        yield i, row


def _kind_of(row: Row, file: File) -> str:
    """The kind whose columns the row has in the right types, else "record"."""
    kind = infer_kind(row)
    try:
        check_row(row, kind, file.name)
    except InputError:
        return "record"
    return kind


def read(name: str, kind: str = "", *, limit: int = 0, columns: Mapping[str, str] = {}) -> Table:
    """A table from a set's name, "name/part", an address or "hub:owner/set[/file or split]".

    Args:
        name: see `truing data`.
        kind: the kind of rows wanted; "" takes what the set is.
        limit: only the first so many rows; 0 for all.
        columns: to rename, new name to old, of the rows as the set gives them.
    Returns:
        rows whose lineage names the source row and the licence; those that cannot be used are
        left out and counted in the metric `left_out`.
    Raises:
        InputError: unknown name, file missing or not as its checksum says, wrong kind.
    """
    if name.startswith(("https://", "http://", "hub:")):
        from truing import dataset_files

        found, licence = dataset_files.fetch_data(name)
        table = joined(found, kind, limit, columns)
        return table.with_lineage(source=private.shown(name), licence=licence)
    head, _, part = name.partition("/")
    entry = _find(head)
    file = _choose(entry, part)
    _check(file, name)
    key = f"{head}/{file.part}"
    if not file.readable:
        raise InputError("not a table", where=str(file.path), fix="Known: " + ", ".join(TABLES))
    _warn(entry)
    rows: list[Row] = []
    numbers: list[int] = []
    licence = short(entry.licence)
    left_out = 0
    for i, row in _rows(file.path, key):
        if row is None:
            left_out += 1
            continue
        rows.append(row)
        numbers.append(i)
        if limit and len(rows) >= limit:
            break
    if left_out:
        current().metric(data=key, left_out=left_out)
    shaped = key in SHAPES and not columns
    rows = renaming.renamed(rows, columns, key, numbers)
    found = SHAPES[key][0] if shaped else _kind_of(dict(rows[0]), file) if rows else ""
    for i, row in zip(numbers, rows, strict=True):
        row["lineage"] = {"source": f"{key} row {i}", "licence": licence}
    table = Table(found, rows, where=key, numbers=numbers, allow_empty=False)
    return table.expect(kind, where=f"data set {name}") if kind else table


def joined(shards: Sequence[Path], kind: str, limit: int, columns: Mapping[str, str] = {}) -> Table:
    """The rows of several files, in their order, as one table."""
    tables: list[Table] = []
    for shard in shards:
        have = sum(map(len, tables))
        if limit and have >= limit:
            break
        rest = limit - have if limit else 0
        tables.append(tablefiles.read_file(shard, kind, limit=rest, columns=columns))
    return tables[0] if len(tables) == 1 else Table.joined(tables)


_warned: set[str] = set()  # sets whose licence was told of in this process


def _warn(entry: DataSet) -> None:
    """Say once that a set in use is not for commercial purposes: nor is what comes of it."""
    if entry.name not in _warned and forbids_commercial(entry.licence):
        _warned.add(entry.name)
        print(
            f"truing: warning: the data set {entry.name!r} is for research or other non-commercial "
            "use alone, and so is what is made or trained from it; its licence: "
            f"{shorten(entry.licence, 160)}",
            file=sys.stderr,
        )


def of_file(path: Path, read: Callable[[], Table]) -> Table:
    """What `read` makes of a file; where a set lists it, it is checked as one of the set.

    Its rows get the set's name and licence, and its columns stay as they are.
    """
    found = dataindex.file_at(path)
    if found is None:
        return read()
    entry, file = found
    _check(file, f"{entry.name}/{file.part}")
    _warn(entry)
    return read().with_lineage(source=f"{entry.name}/{file.part}", licence=short(entry.licence))


def _licence(row: Row) -> str:
    return str(cast(Row, row.get("lineage") or {}).get("licence") or "")


def licence_of(tables: Iterable[Table]) -> str:
    """The strictest licence that the rows' lineage names; "" when none does.

    What is trained on these rows carries it: `model.adding(change, licence=...)`.
    """
    named = {_licence(row) for table in tables for row in table} - {""}
    return strictest(sorted(named)) if named else ""


def licensed(made: object, inputs: Mapping[str, object]) -> object:
    """What a method made; rows that come out without a licence get the strictest of the inputs.

    A row that was kept from an input where it had none stays without.

    Args:
        made: any noun; what is no table comes back as it is.
        inputs: the method's, by name; those that take several, by role.
    """
    if not isinstance(made, Table):
        return made
    nested = (v.values() if isinstance(v, Mapping) else [v] for v in inputs.values())
    given = [n for nouns in nested for n in cast("Iterable[object]", nouns) if isinstance(n, Table)]
    licence = licence_of(given)
    if not licence or all(map(_licence, made)):
        return made
    kept = [row for table in given for row in table if not _licence(row)]
    free = {row["id"] for row in kept} | {row_id(row) for row in kept}  # of another id, if it was
    rows = [
        row
        if _licence(row) or row["id"] in free or row_id(row) in free
        else row | {"lineage": cast(Row, row["lineage"]) | {"licence": licence}}
        for row in made
    ]
    return made.remade(made.kind, rows, range(len(made)))

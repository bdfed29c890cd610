"""Tables read from files: every fault names the file, the row and the field.

Beside it what decides how Parquet holds a column, `to_array`; `tablewriting` writes the files.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import gzip
import io
import itertools
import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast

from truing import csvcells, renaming, shards
from truing.core.files import expanded
from truing.errors import InputError, OtherVersion, beside
from truing.kinds import KINDS, Message, Row
from truing.tables import SCHEMA_VERSION, Table, row_id

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

UTF8 = "Save it as UTF-8"
SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".json", ".csv", ".csv.gz", shards.ARROW)


def read(
    source: str | Path, kind: str = "", *, limit: int = 0, columns: Mapping[str, str] | None = None
) -> Table:
    """See `Table.read`."""
    _check_asked(source, limit)
    source, told = renaming.split(str(source))
    own = renaming.checked(columns or {}, where=source)
    columns = renaming.checked({**told, **own}, where=source)
    path = expanded(source)
    if path.is_dir() and (path / "table.parquet").is_file():
        path = path / "table.parquet"
    if path.is_file():
        shards.warn_of_others(path)
        return read_file(path, kind, limit=limit, columns=columns)
    from truing import datasets

    if datasets.knows(source):
        return datasets.read(source, kind, limit=limit, columns=columns)
    if found := shards.local(path):
        return datasets.joined(found, kind, limit, columns)
    if path.is_dir():
        there = shards.tables_in(path)
        fix = f"Name a file, such as {path / there[0]}" if there else ""
        fix = fix or "Name a file, or one of `truing data`"
        raise InputError("a folder without table.parquet", where=source, fix=fix)
    if path.suffix or "/" in source:
        fix = hub_fix(source) or beside(path, SUFFIXES)
        raise InputError("no such file", where=source, fix=fix)
    return datasets.read(source, kind, limit=limit, columns=columns)


def read_file(
    path: Path, kind: str = "", *, limit: int = 0, columns: Mapping[str, str] = {}
) -> Table:
    """A table of one file, as one of the set that lists it, if any does."""
    from truing import datasets

    return datasets.of_file(path, functools.partial(_from_file, path, kind, limit, columns))


def _check_asked(source: object, limit: object) -> None:
    if not isinstance(source, (str, os.PathLike)):
        raise InputError(
            "a table is read from a path, or by a data set's name",
            where="Table.read",
            seen=source,
            fix="Rows that are at hand become one by Table(kind, rows)",
        )
    if not isinstance(limit, int) or limit < 0:
        fix = "Give how many rows to read; 0 is all"
        raise InputError("limit must be at least 0", where="Table.read", seen=limit, fix=fix)


def _from_file(path: Path, kind: str, limit: int, columns: Mapping[str, str]) -> Table:
    name = path.name
    if name.endswith((".parquet", shards.ARROW)):
        return _arrow(path, kind, limit, columns)
    if name.endswith((".jsonl", ".jsonl.gz")):
        return _table(path, kind, _json_lines(path), limit, columns)
    if name.endswith(".json"):
        return _table(path, kind, _json_list(path), limit, columns)
    if name.endswith((".csv", ".csv.gz")):  # whose header names what its cells are
        return _table(path, kind, csvcells.as_values(_csv(path, kind, columns)), limit, {})
    raise InputError("unknown sort of file", where=str(path), fix="Known: " + ", ".join(SUFFIXES))


def hub_fix(text: str) -> str:
    """What to write for a name of the Hugging Face hub, owner/set, or for several, a,b; else ""."""
    if all(text.partition(",")):
        return "Give one: select/mixture makes one table of several"
    found = re.fullmatch(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?(\[.*\])?", text)
    if found is None or Path(text).parent.exists() or text.endswith(SUFFIXES):
        return ""
    split = f"/{found[2]}" if found[2] else ""  # which other tools write owner/set:split
    return f"A data set of the Hugging Face hub is written hub:{found[1]}{split}"


def raw_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Rows of a .jsonl, .csv (or .gz), .json or Parquet file as they are: no kind, id or lineage.

    Each comes with its number: the line where it begins; in .json and Parquet rows are counted.
    """
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        yield from _json_lines(path)
    elif path.name.endswith(".json"):
        yield from _json_list(path)
    elif path.name.endswith((".csv", ".csv.gz")):
        yield from _csv(path, "record", {})
    else:
        for i, row in enumerate(_arrow(path, "record", 0, {}), 1):
            yield i, {k: v for k, v in row.items() if k != "lineage"}


def _table(
    path: Path,
    kind: str,
    numbered: Iterator[tuple[int, Row]],
    limit: int,
    columns: Mapping[str, str],
) -> Table:
    head = list(itertools.islice(numbered, limit or None))
    numbers = [number for number, _ in head]
    rows = renaming.renamed([row for _, row in head], columns, str(path), numbers)
    return told_apart(Table(kind, rows, where=str(path), numbers=numbers, allow_empty=False))


def told_apart(table: Table) -> Table:
    """The table; an InputError where two rows that differ have one id, by which they are known.

    Rows that differ in their lineage alone are one row that was made twice.
    """
    seen: dict[object, int] = {}
    for i, row in enumerate(table):
        first = seen.setdefault(row["id"], i)
        if first != i and row_id(table[first]) != row_id(row):
            raise InputError(
                f"field 'id' is that of row {table.number(first)}, and the rows differ",
                where=table.place(i),
                seen=row["id"],
                fix="Rename the column, or make it unique: results are put together by ids",
            )
    return table


def _open(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")


def _json_lines(path: Path) -> Iterator[tuple[int, Row]]:
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise InputError(
                        f"not valid JSON: {error}",
                        where=f"{path} row {number}",
                        seen=line.decode("utf-8", "replace")[:80],
                        fix=_json_fix(line, error),
                    ) from None
                if not isinstance(row, dict):
                    raise InputError(
                        "a row must be a JSON object",
                        where=f"{path} row {number}",
                        seen=row,
                        fix='Write {"column": value, ...}, one object a line',
                    )
                yield number, cast(Row, row)
    except (OSError, EOFError, zlib.error) as error:
        where = f"{path} row {number + 1}"
        raise InputError(f"cannot be read: {error}", where=where, fix=_whole(error)) from None


def _whole(error: Exception) -> str:
    """What to do about a compressed file that breaks off or is none; "" for other errors."""
    compressed = isinstance(error, (EOFError, zlib.error, gzip.BadGzipFile))
    return "Copy or compress it again; a file that is not compressed has no .gz" * compressed


def _json_fix(line: bytes, error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return UTF8
    listed = "One object a line, without a list around them; or name the file .json"
    return listed if line.lstrip()[:1] == b"[" else ""


def _json_list(path: Path) -> Iterator[tuple[int, Row]]:
    """Objects of a file that holds one list of them, counted from 1; lines, where those are there.

    Files of both forms are called .json.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        fix = UTF8 if isinstance(error, UnicodeDecodeError) else ""
        raise InputError(f"cannot be read: {error}", where=str(path), fix=fix) from None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        if not text.lstrip().startswith("["):
            yield from _json_lines(path)
            return
        fix = "Write [{...}, {...}], or one object a line"
        raise InputError(f"not valid JSON: {error}", where=str(path), fix=fix) from None
    rows = cast("list[object]", found if isinstance(found, list) else [found])
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            fix = 'Write [{"column": value, ...}, ...]'
            where = f"{path} row {number}"
            raise InputError("a row must be a JSON object", where=where, seen=row, fix=fix)
        yield number, cast(Row, row)


def _csv(path: Path, kind: str, columns: Mapping[str, str]) -> Iterator[tuple[int, Row]]:
    csv.field_size_limit(2**31 - 1)  # of a whole document
    line = 0  # the last one that was read; a quoted field may hold several
    try:
        with _open(path) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            names: list[str] = []
            for values in reader:
                first, line = line + 1, reader.line_num
                if not values:
                    continue  # a blank line
                where = f"{path} row {first}"
                if not names:
                    names = renaming.header(_names(values, where), columns, where)
                    continue
                if len(values) > len(names):
                    fix = "Put quotes around a field that holds a comma"
                    raise InputError(
                        "more fields than the header has", where=where, seen=values, fix=fix
                    )
                yield first, csvcells.typed(dict(zip(names, values, strict=False)), kind, where)
    except InputError:
        raise
    except (OSError, EOFError, zlib.error, csv.Error, UnicodeDecodeError) as error:
        fix = UTF8 if isinstance(error, UnicodeDecodeError) else _whole(error)
        where = f"{path} row {line + 1}"
        raise InputError(f"cannot be read: {error}", where=where, fix=fix) from None


def _names(header: list[str], where: str) -> list[str]:
    """The header of a .csv file; an InputError where columns would be lost or run together."""
    if twice := sorted({n for n in header if header.count(n) > 1}):
        fix = "Rename one of them"
        raise InputError("two columns have one name", where=where, seen=twice, fix=fix)
    if len(header) == 1 and re.search("[;\t]", header[0]):
        raise InputError(
            "there is one column, whose name holds a separator",
            where=where,
            seen=header[0],
            fix="Fields of .csv are separated by commas",
        )
    return header


def _arrow(path: Path, kind: str, limit: int, columns: Mapping[str, str]) -> Table:
    """The rows of a Parquet or Arrow file; a table's own says their kind and may have none."""
    from truing import arrowfiles

    data = arrowfiles.load(path, limit)
    meta = {k.decode(): v.decode() for k, v in (data.schema.metadata or {}).items()}
    version = int(meta.get("truing.schema_version", SCHEMA_VERSION))
    if version > SCHEMA_VERSION:
        raise OtherVersion(
            f"written by a newer version (schema {version}, this one reads {SCHEMA_VERSION})",
            where=str(path),
            fix="Upgrade truing",
        )
    rows = arrowfiles.rows(data, path)
    rows = renaming.renamed(rows, columns, str(path), known=data.column_names)
    written = "" if columns else meta.get("truing.kind", "")
    if not kind and written and written not in KINDS:
        said = "holds rows of a kind that this version does not know"
        raise OtherVersion(said, where=str(path), seen=written, fix="Upgrade truing")
    kind = kind or written
    table = Table(kind, rows, where=str(path), allow_empty="truing.kind" in meta)
    return table if "truing.kind" in meta else told_apart(table)


def _is_messages(values: Sequence[object]) -> bool:
    lists = [cast(list[object], v) for v in values if isinstance(v, list)]
    return bool(lists) and all(
        isinstance(m, Mapping)
        and set(cast(Message, m)) == {"role", "content"}
        and all(isinstance(t, str) for t in cast(Message, m).values())
        for messages in lists
        for m in messages
    )


def _tensors(values: list[object], name: str, where: str) -> tuple[pa.Array, str]:
    """Arrays of one shape as Arrow's tensors; of several, or where some are missing, as .npy."""
    import numpy as np
    import pyarrow as pa

    given = [v for v in values if v is not None]
    arrays = [v for v in given if isinstance(v, np.ndarray) and v.dtype != object]
    if len(arrays) < len(given):
        fix = "Put the others into a column of their own, or leave None in their place"
        said = f"column {name!r} holds arrays of numbers and other things"
        raise InputError(said, where=where, fix=fix)
    if len({(a.shape, a.dtype) for a in arrays}) == 1 and len(given) == len(values):
        return pa.FixedShapeTensorArray.from_numpy_ndarray(np.stack(arrays)), "tensor"

    def written(value: object) -> bytes | None:
        if value is None:
            return None
        file = io.BytesIO()
        np.save(file, cast("np.ndarray", value), allow_pickle=False)
        return file.getvalue()

    return pa.array([written(v) for v in values], pa.binary()), "npy"


def to_array(values: list[object], name: str, where: str) -> tuple[pa.Array, str]:
    """(Arrow array of a column, how it was encoded): what `_parquet` reads back."""
    import pyarrow as pa

    given = [v for v in values if v is not None]
    if any(getattr(v, "ndim", 0) for v in given):
        return _tensors(values, name, where)
    lists = [cast(list[object], v) for v in given if isinstance(v, list)]
    flat = [x for v in lists for x in v] if len(lists) == len(given) else given
    # Arrow would make False of a column of numbers 0.0.
    kinds = {type(x) for x in flat}
    alike = len(kinds) < 2 or kinds == {int, float}
    nested = name == "lineage" or not alike or any(isinstance(x, (dict, list)) for x in flat)
    if nested and not (_is_messages(given) and len(given) == len(values)):
        return _as_json(values, name, where)
    try:
        return pa.array(values), ""
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        return _as_json(values, name, where)


def _as_json(values: list[object], name: str, where: str) -> tuple[pa.Array, str]:
    """A column as JSON text; what JSON has no word for, as bytes of images, in Arrow's form."""
    import pyarrow as pa

    try:
        texts = [None if v is None else json.dumps(v, ensure_ascii=False) for v in values]
        return pa.array(texts, pa.string()), "json"
    except TypeError as error:
        with contextlib.suppress(pa.ArrowException, OverflowError):
            found = pa.array(values)
            if found.to_pylist() == values:  # Arrow gives all rows of a column the same fields
                return found, ""
        fix = "Give what it holds the same fields and types in every row, or leave the column out"
        said = f"column {name!r} holds what no file can: {error}"
        raise InputError(said, where=where, fix=fix) from None

"""Reading tables from files: every fault names the file, the row and the field."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, cast

from truing.errors import InputError
from truing.tables import KINDS, SCHEMA_VERSION, Row, Table

SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".csv", ".csv.gz")


def read(source: str | Path, kind: str = "", *, limit: int = 0) -> Table:
    """See `Table.read`."""
    path = Path(source)
    if path.is_dir() and (path / "table.parquet").is_file():
        path = path / "table.parquet"
    if not path.is_file():
        from truing import datasets

        if (path.suffix or "/" in str(source)) and not datasets.knows(str(source)):
            raise InputError("no such file", where=str(source))
        return datasets.read(str(source), kind, limit=limit)
    name = path.name
    if name.endswith(".parquet"):
        table = _parquet(path, kind, limit)
    elif name.endswith((".jsonl", ".jsonl.gz")):
        table = Table(kind, _head(_json_lines(path), limit), where=str(path), allow_empty=False)
    elif name.endswith((".csv", ".csv.gz")):
        table = Table(
            kind, _head(_csv(path, kind), limit), where=str(path), first=2, allow_empty=False
        )
    else:
        raise InputError(
            "unknown sort of file", where=str(path), fix="Known: " + ", ".join(SUFFIXES)
        )
    return table


def raw_rows(path: Path) -> Iterator[Row]:
    """Rows of a .jsonl, .csv (or .gz) or Parquet file as they are: no kind, no id, no lineage."""
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        yield from _json_lines(path)
    elif path.name.endswith((".csv", ".csv.gz")):
        yield from _csv(path, "record")
    else:
        for row in _parquet(path, "record", 0):
            yield {k: v for k, v in row.items() if k != "lineage"}


def _head(rows: Iterator[Row], limit: int) -> Iterator[Row]:
    for i, row in enumerate(rows):
        if limit and i >= limit:
            return
        yield row


def _open(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")


def _json_lines(path: Path) -> Iterator[Row]:
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
                    ) from None
                if not isinstance(row, dict):
                    raise InputError(
                        "a row must be a JSON object", where=f"{path} row {number}", seen=row
                    )
                yield cast(Row, row)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"cannot be read: {error}", where=f"{path} row {number + 1}") from None


def _csv(path: Path, kind: str) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # of a whole document
    number = 0
    try:
        with _open(path) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as file:
            lines = csv.DictReader(file)
            for line in lines:
                number = lines.line_num
                yield _typed(line, kind, f"{path} row {number}")
    except InputError:
        raise
    except (OSError, EOFError, zlib.error, csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"cannot be read: {error}", where=f"{path} row {number + 1}") from None


def _typed(line: Mapping[str, object], kind: str, where: str) -> Row:
    """A line with the columns that are not texts as what they are."""
    if None in line:
        raise InputError("more fields than the header has", where=where)
    row: Row = dict(line)
    if "label" in row and kind in ("", "unpaired"):
        text = str(row["label"]).strip().lower()
        if text not in ("true", "false", "1", "0"):
            raise InputError("field 'label' must be true or false", where=where, seen=row["label"])
        row["label"] = text in ("true", "1")
    for field in {"score", "margin"} & set(row):
        try:
            row[field] = float(str(row[field]))
        except ValueError:
            raise InputError(
                f"field {field!r} must be a number", where=where, seen=row[field]
            ) from None
    return row


def _parquet(path: Path, kind: str, limit: int) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        data = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"not a readable Parquet file: {error}", where=str(path)) from None
    if limit:
        data = data.slice(0, limit)
    meta = {k.decode(): v.decode() for k, v in (data.schema.metadata or {}).items()}
    version = int(meta.get("truing.schema_version", SCHEMA_VERSION))
    if version > SCHEMA_VERSION:
        raise InputError(
            f"written by a newer version (schema {version}, this one reads {SCHEMA_VERSION})",
            where=str(path),
            fix="Upgrade truing",
        )
    columns: dict[str, list[object]] = {}
    for field in data.schema:
        how = (field.metadata or {}).get(b"truing", b"").decode()
        column = data.column(field.name)
        if how == "tensor" or isinstance(field.type, pa.FixedShapeTensorType):
            columns[field.name] = list(column.combine_chunks().to_numpy_ndarray())
        elif how == "json":
            columns[field.name] = [None if v is None else json.loads(v) for v in column.to_pylist()]
        else:
            columns[field.name] = column.to_pylist()
    names = list(columns)
    rows = [
        {n: v for n, v in zip(names, values, strict=True) if v is not None}
        for values in zip(*columns.values(), strict=True)
    ]
    kind = kind or meta.get("truing.kind", "")
    if kind and kind not in KINDS:
        kind = ""
    return Table(kind, rows, where=str(path), allow_empty="truing.kind" in meta)

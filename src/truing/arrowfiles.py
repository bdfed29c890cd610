"""Parquet and Arrow files as rows: a table's own, and those of other programs."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING

from truing.errors import InputError
from truing.kinds import Row

if TYPE_CHECKING:
    import pyarrow as pa

MAGIC = b"ARROW1"  # begins Arrow's file format; its stream, which `datasets` saves, has none


def load(path: Path, limit: int) -> pa.Table:
    """The columns of a file, of its first rows where `limit` is not 0."""
    import pyarrow as pa

    is_parquet = path.name.endswith(".parquet")
    try:
        data = _parquet(path) if is_parquet else _arrow(path)
        if len(set(data.column_names)) < data.num_columns:
            raise pa.ArrowInvalid("two of its columns have one name")
    except (pa.ArrowInvalid, OSError) as error:
        fix = "Fetch or write it again; a file of lines is named .jsonl or .csv"
        sort = "Parquet" if is_parquet else "Arrow"
        said = f"not a readable {sort} file: {error}"
        raise InputError(said, where=str(path), fix=fix) from None
    return data.slice(0, limit) if limit else data


def _parquet(path: Path) -> pa.Table:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:  # pq.read_table imports pandas where that is installed
        return file.read()


def _arrow(path: Path) -> pa.Table:
    from pyarrow import ipc

    with path.open("rb") as file:
        begun = file.read(len(MAGIC))
        file.seek(0)
        with (ipc.open_file if begun == MAGIC else ipc.open_stream)(file) as reader:
            return reader.read_all()


def rows(data: pa.Table, path: Path) -> list[Row]:
    """Its rows, in the forms that `Table.to_arrow` wrote; what is missing is left out."""
    import pyarrow as pa

    columns: dict[str, list[object]] = {}
    for field in data.schema:
        how = (field.metadata or {}).get(b"truing", b"").decode()
        column = data.column(field.name)
        if how == "tensor" or isinstance(field.type, pa.FixedShapeTensorType):
            # Arrow's own memory is read-only, of which torch warns; rows of other files are not.
            columns[field.name] = list(column.combine_chunks().to_numpy_ndarray().copy())
        elif how == "npy":
            columns[field.name] = [_npy(v, path, field.name) for v in column.to_pylist()]
        elif how == "json":
            columns[field.name] = [None if v is None else json.loads(v) for v in column.to_pylist()]
        else:
            columns[field.name] = _plain(column, path, field.name)
    names = list(columns)
    return [
        {n: v for n, v in zip(names, values, strict=True) if v is not None}
        for values in zip(*columns.values(), strict=True)
    ]


def _plain(column: pa.ChunkedArray, path: Path, name: str) -> list[object]:
    """Values of a column, times to the microsecond, which is what Python's have."""
    import pyarrow as pa

    try:
        if pa.types.is_timestamp(column.type) and column.type.unit == "ns":
            column = column.cast(pa.timestamp("us", column.type.tz))
        return column.to_pylist()
    except (pa.ArrowInvalid, ValueError) as error:
        fix = "Round its times to microseconds, or write them as text"
        if "zoneinfo" in str(error):  # the system has no data of time zones
            fix = "pip install tzdata"
        said = f"column {name!r} cannot be read: {error}"
        raise InputError(said, where=str(path), fix=fix) from None


def _npy(value: bytes | None, path: Path, name: str) -> object:
    import numpy as np

    try:
        return None if value is None else np.load(io.BytesIO(value), allow_pickle=False)
    except (ValueError, EOFError) as error:
        said, fix = f"column {name!r} holds no array: {error}", "Write the table again"
        raise InputError(said, where=str(path), fix=fix) from None

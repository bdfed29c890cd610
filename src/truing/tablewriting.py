"""Tables written to files: what a sort of file cannot hold is told, and nothing is guessed.

Parquet holds all; to other programs columns without one form are JSON text in it. JSON has no NaN
and no infinity, which become null, and no dates, which become texts. Cells of a .csv file are
texts, and what reads them takes each column for what it looks like (`csvcells`): the rows are read
again as they were written, and a column that would come back otherwise is named.
"""

from __future__ import annotations

import csv
import datetime
import io
import json
import os
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

from truing import csvcells, jsontext, tablefiles
from truing.errors import InputError, shorten
from truing.faults import placing
from truing.kinds import Row
from truing.tables import Table

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

Lost = dict[str, str]  # by column: the first value that does not come back, in words
SHOWN = 3  # columns that a warning names
SAVED = "table.parquet"  # of a table's own folder, which is read here alone


@placing()
def write(table: Table, path: Path, *, new: bool) -> None:
    """See `Table.write`, which has looked at the ending."""
    lost: Lost = {}
    lines: list[str] = []
    # All that can be refused is refused before there is a folder or a file.
    arrow = table.to_arrow() if path.suffix == ".parquet" else None
    if arrow is None:
        lines = (_csv if path.suffix == ".csv" else _json_lines)(table, path, lost)
    path.parent.mkdir(parents=True, exist_ok=True)
    # No longer than a name may be, whatever the file is called.
    partial = path.with_name(f".truing-{os.getpid()}-{threading.get_ident()}.partial")
    try:
        if arrow is not None:
            import pyarrow.parquet as pq

            pq.write_table(arrow, partial)
        else:
            with partial.open("w", encoding="utf-8", newline="") as file:
                file.writelines(lines)
        if new:
            _claim(path)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    _warn(path, lost)
    if arrow is not None and path.name != SAVED:
        _warn_of_texts(path, arrow.schema)


def _claim(path: Path) -> None:
    """Take a name that nobody has; who comes second is told, and replaces nothing."""
    try:
        path.open("xb").close()
    except FileExistsError:
        fix = "Name a new file: what was made is kept, and only written again"
        raise InputError("there is such a file by now", where=str(path), fix=fix) from None


def _warn(path: Path, lost: Lost) -> None:
    if lost:
        more = f", and of {len(lost) - SHOWN} more columns" if len(lost) > SHOWN else ""
        told = "; ".join(list(lost.values())[:SHOWN])
        print(
            f"truing: warning: {path} does not hold all as it is: {told}{more}. "
            f"{'.parquet does' if path.suffix == '.jsonl' else '.jsonl and .parquet hold more'}",
            file=sys.stderr,
        )


def _warn_of_texts(path: Path, schema: pa.Schema) -> None:
    """Say which columns of a Parquet file other programs read as texts, for want of one form."""
    hows = {f.name: (f.metadata or {}).get(b"truing") for f in schema if f.name != "lineage"}
    if texts := [name for name, how in hows.items() if how == b"json"]:
        more = ", ..." if len(texts) > SHOWN else ""
        print(
            f"truing: warning: {path}: to other programs these columns are JSON text: "
            f"{', '.join(texts[:SHOWN])}{more}. In .jsonl they are what they are here",
            file=sys.stderr,
        )


def _lose(lost: Lost, table: Table, i: int, name: str, value: object, found: object) -> None:
    """Note what becomes of a value, for the first one of each column."""
    was, becomes = ("nothing" if v is None else shorten(v, 40) for v in (value, found))
    lost.setdefault(name, f"column {name!r} of {table.place(i)}, {was} is read as {becomes}")


def _plain(value: object) -> object:
    """`value` with numbers of numpy's as Python's, and dates and times as texts, at any depth."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in cast("dict[str, object]", value).items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in cast("list[object]", value)]
    if getattr(value, "ndim", None) == 0:
        value = cast("np.generic", value).item()
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    return value


def _said(table: Table, i: int, name: str, path: Path) -> tuple[str, object]:
    """(JSON text of a cell, what it says): null for what is not finite.

    Raises:
        InputError: it holds what JSON has no word for.
    """
    value = table[i].get(name)
    try:
        try:
            return json.dumps(value, ensure_ascii=False, allow_nan=False), value
        except (TypeError, ValueError):
            found = jsontext.finite(_plain(value))
            return json.dumps(found, ensure_ascii=False), found
    except TypeError as error:
        raise InputError(
            f"column {name!r} holds what JSON cannot: {error}",
            where=f"{path}: {table.place(i)}",
            fix=_way_out(table, name),
        ) from None


def _way_out(table: Table, name: str) -> str:
    """What to do with a column that JSON cannot hold: Parquet may, or nothing does."""
    try:
        tablefiles.to_array([row.get(name) for row in table], name, table.source)
    except InputError:
        return "Make it texts, numbers, dates, or lists or dicts of these; of a set a list"
    return "Write .parquet"


def _json_lines(table: Table, path: Path, lost: Lost) -> list[str]:
    lines: list[str] = []
    for i, row in enumerate(table):
        try:
            text = json.dumps(row, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError):
            said: Row = {}
            for name, value in row.items():
                said[name] = _said(table, i, name, path)[1]
                if said[name] != value:
                    _lose(lost, table, i, name, value, said[name])
            text = json.dumps(said, ensure_ascii=False)
        lines.append(text + "\n")
    return lines


def _csv(table: Table, path: Path, lost: Lost) -> list[str]:
    names = [n for n in table.columns if n != "lineage"]
    licences = [cast(Row, row["lineage"]).get("licence") or "" for row in table]
    if any(licences) and csvcells.LICENCE not in names:
        names.append(csvcells.LICENCE)
    lines: list[dict[str, str]] = []
    for i, row in enumerate(table):
        line = dict.fromkeys(names, "") | {csvcells.LICENCE: str(licences[i])}
        for name in names:
            value = row.get(name)
            if isinstance(value, str):
                line[name] = value
            elif value is not None:
                line[name], found = _said(table, i, name, path)
                if isinstance(found, str):
                    line[name] = found
                elif found is None:
                    line[name] = ""
                if found != value:
                    _lose(lost, table, i, name, value, found)
        lines.append(line)
    _read_again(table, lines, lost)
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(names)
    writer.writerows([line[n] for n in names] for line in lines)
    return [file.getvalue()]


def _read_again(table: Table, lines: list[dict[str, str]], lost: Lost) -> None:
    """Note what the lines of a .csv file are read as, where that is not what the rows hold."""
    try:
        rows = [(i, csvcells.typed(line, "", table.place(i))) for i, line in enumerate(lines)]
    except InputError as error:
        lost.setdefault("", f"{error.where} cannot be read, as its {error.message}")
        return
    for i, found in csvcells.as_values(iter(rows)):
        row = table[i]
        for name in (n for n in lines[i] if n != csvcells.LICENCE):
            if _differ(row.get(name), found.get(name)):
                _lose(lost, table, i, name, row.get(name), found.get(name))


def _differ(value: object, found: object) -> bool:
    """Whether a value came back as another; lists come back as such, or as their text."""
    if getattr(value, "ndim", None) == 0:
        value = _plain(value)
    if isinstance(value, (Mapping, list, tuple)):
        return not isinstance(found, (dict, list))
    return value != found or isinstance(value, bool) != isinstance(found, bool)

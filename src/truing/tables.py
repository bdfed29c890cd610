"""`Table`: rows of one declared kind, in Parquet, each with an id and its lineage.

Column names are those of the Hugging Face ecosystem (`prompt`, `messages`, `chosen`, `rejected`,
`completion`, `label`). `lineage` says which principle, prompt, generator, judge, filter and seed
made a row and which rows it came from (`parents`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from datetime import date, time
from pathlib import Path
from typing import TYPE_CHECKING, cast

from truing.errors import InputError, unknown
from truing.kinds import KINDS, Row, infer_kind
from truing.kinds import Message as Message
from truing.kinds import as_prompt as as_prompt
from truing.kinds import prompt_of as prompt_of
from truing.kinds import user_text as user_text
from truing.origins import Joined, Made, Origin
from truing.readings import READINGS
from truing.renaming import advice
from truing.row_checks import check_row, values_of
from truing.surrogates import mended

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

SCHEMA_VERSION = 1
WRITTEN = (".jsonl", ".csv", ".parquet")  # files that a table can be written to
# Endings of other files, with which nobody means a folder.
OTHERS = ".json .gz .zip .tsv .txt .xlsx .arrow .yaml .yml .html .md .safetensors .gguf .bin .pt"


def names_file(name: str | Path) -> bool:
    """Whether what a result is to be called ends as files do, and not as a folder may."""
    return Path(name).suffix.lower() in (*WRITTEN, *OTHERS.split())


def _canonical(value: object) -> object:
    """A JSON-able stand-in with the same identity as `value`."""
    if hasattr(value, "tobytes"):
        array = cast("np.ndarray", value)
        digest = hashlib.blake2b(array.tobytes(), digest_size=16).hexdigest()
        return {"array": [str(array.dtype), list(array.shape), digest]}
    if isinstance(value, Mapping):
        return {str(k): _canonical(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_canonical(v) for v in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)  # 1 and 1.0 are one number; a column that holds both is stored as floats
    if isinstance(value, (date, time)):  # a pandas.Timestamp is one, of another name
        return {"date": value.isoformat()}
    if value is not None and not isinstance(value, (str, int, float)):
        return {type(value).__name__: repr(value)}  # decimals, bytes of a Parquet file
    return value


def content_hash(value: object, size: int = 16) -> str:
    """Hex digest of `size` bytes over canonical JSON: the identity of rows, settings, keys."""
    text = json.dumps(_canonical(value), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=size).hexdigest()


def _entered(rows: Iterable[object], where: str = "table") -> list[Row]:
    """Rows as a table keeps them."""
    return [mended(values_of(row, f"{where} row {i}")) for i, row in enumerate(rows, 1)]


class Table:
    """Rows of one kind: `table.kind`, and `table.rows`, a list of dicts.

    `len(table)`, `table[i]` and iteration are over rows, counted from 0. Rows are mended and
    checked where they enter; what is derived from a table looks at no row again, but at what is new
    in it. Methods of a table change nothing in it: they give another.

    Args:
        kind: one of `truing.kinds.KINDS`; "" infers it from the columns.
        rows: plain dicts. Missing `id` (hash of the content) and `lineage` are filled in. Fields
            that are None are left out, as is NaN where texts are; numbers of numpy are plain ones.
        where: the source named in errors, such as a file name.
        numbers: of the rows in that source, for errors; () counts from 1.
        allow_empty: an empty table is an InputError unless this is set.
    Raises:
        InputError: unknown kind, or a row that lacks a column or has another type in it; its place
            is named.
    """

    def __init__(
        self,
        kind: str,
        rows: Iterable[Mapping[str, object]],
        *,
        where: str = "table",
        numbers: Sequence[int] = (),
        allow_empty: bool = True,
    ) -> None:
        items = _entered(rows, where)
        if not items and not allow_empty:
            raise InputError("no rows", where=where, fix="Give at least one row")
        if not kind:
            kind = infer_kind(items[0] if items else {})
        if kind not in KINDS:
            raise unknown("kind of table", kind, KINDS, where=where)
        self.kind, self.source = kind, where
        self.rows: list[Row] = items
        self._origin, self._at = Origin(where, numbers), range(len(items))
        self._key = ""
        self._checked()

    def _checked(self) -> Table:
        """Itself, with ids for rows that have none; an InputError names the first wrong row."""
        for i, row in enumerate(self.rows):
            try:
                check_row(row, self.kind, self.source)
            except InputError as error:
                error.where = self.place(i)
                raise
            row.setdefault("lineage", {})
            given = row.get("id", "")
            row["id"] = row_id(row) if given == "" else str(given)
        return self

    def _derived(self, rows: list[Row], at: Iterable[int] | None = None, kind: str = "") -> Table:
        """A table of rows that this one knows or that were made from those `at` these places."""
        made = Table(kind or self.kind, (), where=self.source)
        made.rows, made._origin = rows, self._origin
        made._at = self._at if at is None else [self._at[i] for i in at]
        return made

    @classmethod
    def joined(cls, tables: Sequence[Table]) -> Table:
        """The rows of several tables of one kind, in order; errors call each as its own does.

        Ids that begin anew in each table are told apart by its number: the second "7" is "7/2".
        """
        if not tables:
            raise InputError("no tables to join", where="table", fix="Give at least one")
        first = tables[0]
        for other in tables[1:]:
            if other.kind != first.kind:
                raise InputError(
                    f"its rows are of kind {other.kind!r}, those of {first.source} of kind "
                    f"{first.kind!r}",
                    where=other.source,
                )
        rows: list[Row] = []
        seen: dict[object, Row] = {}
        for number, table in enumerate(tables, 1):
            for row in map(dict, table):
                while (other := seen.setdefault(row["id"], row)) is not row:
                    if row_id(other) == row_id(row):
                        break
                    row["id"] = f"{row['id']}/{number}"
                rows.append(row)
        made = first._derived(rows)
        made._origin, made._at = Joined(tables), range(len(made.rows))
        return made

    def remade(self, kind: str, rows: Iterable[Mapping[str, object]], at: Sequence[int]) -> Table:
        """A table of new rows, each called by errors as the row that it was made from.

        Args:
            at: for each new row, the place of that one, counted from 0.
        """
        return self._derived(_entered(rows), at, kind)._checked()

    def made_in(self, step: str, inputs: Sequence[Table]) -> Table:
        """Itself; errors call its rows by those of the step's inputs that they came from."""
        self.source = f"step {step}"
        self._origin, self._at = Made(step, self.rows, inputs), range(len(self.rows))
        return self

    def __getstate__(self) -> dict[str, object]:
        """What a pickle holds: not the tables that this one was made from, nor theirs."""
        if type(self._origin) is Origin:
            return vars(self)
        return {**vars(self), "_origin": Origin(self.source), "_at": range(len(self))}

    def place(self, i: int) -> str:
        """What an error calls row `i`, counted from 0: "pairs.jsonl row 12", a line of a file."""
        return self._origin.place(self._at[i])

    def number(self, i: int) -> int:
        """Number of row `i`, counted from 0, in its source: by default its place, from 1."""
        return self._origin.number(self._at[i])

    @contextlib.contextmanager
    def naming(self, at: Sequence[int] = ()) -> Generator[None]:
        """Inside the block an error of "row N", of rows handed on, names the row as `place` does.

        Args:
            at: place of each row that was handed on; () is all of them in order.
        """
        try:
            yield
        except InputError as error:
            found, known = re.fullmatch(r"(.*?)\s*row (\d+)", error.where), at or range(len(self))
            if found and 0 < int(found[2]) <= len(known):  # else of other rows, as of another file
                error.where = f"{found[1]} {self.place(known[int(found[2]) - 1])}".strip()
            raise

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __getitem__(self, i: int) -> Row:
        return self.rows[i]

    def __repr__(self) -> str:
        return f"Table({self.kind}, {len(self)} rows: {', '.join(self.columns)})"

    @property
    def columns(self) -> list[str]:
        """Column names in order of first appearance."""
        return list(dict.fromkeys(k for row in self.rows for k in row))

    @property
    def key(self) -> str:
        """Content hash of kind and rows, lineage included."""
        if not self._key:
            self._key = content_hash([self.kind, [content_hash(r) for r in self.rows]])
        return self._key

    def column(self, name: str) -> list[object]:
        """All values of one column, in order; None where a row has none.

        Raises:
            InputError: no row has a column of that name; it offers the nearest one.
        """
        if self.rows and name not in self.columns:
            raise unknown("column", name, self.columns, where=self.source)
        return [row.get(name) for row in self.rows]

    def expect(self, *kinds: str, where: str = "") -> Table:
        """Itself when it is of one of `kinds`; else its rows read as the first that they fit.

        Raises:
            InputError: they fit none; it says which columns are needed.
        """
        if self.kind in kinds:
            return self
        for kind in kinds:
            if (self.kind, kind) in READINGS:
                return self._read_as(kind)
            if any(set(c) <= set(self.columns) for c in KINDS[kind]) and kind != "record":
                return self._derived([dict(r) for r in self.rows], kind=kind)._checked()
        needed = " or ".join(", ".join(c) for kind in kinds for c in KINDS[kind])
        raise InputError(
            f"needs rows of kind {' or '.join(kinds)}, got {self.kind!r} from {self.source}",
            where=where or self.source,
            seen=[c for c in self.columns if c not in ("id", "lineage")],
            fix=f"Their columns are {needed}. {advice(self.rows, kinds)}",
        )

    def _read_as(self, kind: str) -> Table:
        """The same rows in the form of `kind`, by `readings.READINGS`; ids stay."""
        rows: list[Row] = []
        for i, row in enumerate(self.rows):
            try:
                rows.append(READINGS[(self.kind, kind)][1](row))
            except InputError as error:
                error.where = self.place(i)
                raise
        return self._derived(rows, kind=kind)._checked()

    def where(self, keep: Callable[[Row], bool]) -> Table:
        """The rows for which `keep` is true."""
        return self.take(i for i, row in enumerate(self.rows) if keep(row))

    def take(self, places: Iterable[int]) -> Table:
        """The rows at these places, counted from 0, with their numbers in the source."""
        kept = list(places)
        return self._derived([dict(self.rows[i]) for i in kept], kept)

    def map(self, change: Callable[[Row], Row], kind: str = "") -> Table:
        """A table of changed rows; ids are made anew, the old ones become parents.

        Args:
            change: from a copy of a row to the new row.
            kind: of the new rows; "" keeps this table's.
        Raises:
            InputError: a new row is none of that kind, or no dict.
        """
        rows: list[Row] = []
        for i, row in enumerate(self.rows):
            given = values_of(change(dict(row)), self.place(i))
            new = {mended(k): v if v is row.get(k) else mended(v) for k, v in given.items()}
            new.pop("id", None)
            lineage = dict(cast(Row, row.get("lineage") or {}))
            new["lineage"] = lineage | {"parents": [row["id"]]}
            rows.append(new)
        return self._derived(rows, kind=kind)._checked()

    def with_lineage(self, **facts: object) -> Table:
        """The same rows with `facts` added to every lineage; `filter` joins earlier filters."""
        rows: list[Row] = []
        facts = mended(facts)
        for row in self.rows:
            lineage = cast(Row, row.get("lineage") or {}) | facts
            if "filter" in facts:
                passed = cast("list[object]", lineage.get("filters") or [])
                lineage["filters"] = [*passed, lineage.pop("filter")]
            rows.append(row | {"lineage": lineage})
        return self._derived(rows)

    def split(self, n: int) -> tuple[Table, Table]:
        """The first `n` rows and the rest."""
        places = range(len(self))
        return self.take(places[:n]), self.take(places[n:])

    def to_arrow(self) -> pa.Table:
        """As an Arrow table; nested columns other than messages are JSON text, marked as such."""
        import pyarrow as pa

        from truing import tablefiles

        fields: list[pa.Field] = []
        arrays: list[pa.Array] = []
        for name in self.columns:
            array, how = tablefiles.to_array([r.get(name) for r in self.rows], name, self.source)
            arrays.append(array)
            fields.append(pa.field(name, array.type, metadata={"truing": how} if how else None))
        meta = {"truing.kind": self.kind, "truing.schema_version": str(SCHEMA_VERSION)}
        return pa.Table.from_arrays(arrays, schema=pa.schema(fields, metadata=meta))

    def write(self, path: str | Path, *, new: bool = False) -> Path:
        """Write Parquet, JSON Lines or .csv by the file's suffix, atomically.

        Folders above it are made. A .csv is for reading elsewhere: of the lineage it has the
        licence, in a column of its own, and what is neither text nor number is JSON text in it.
        What would not be read again as it is, is told in a warning.

        Args:
            path: a file of that name is replaced.
            new: refuse that.
        Raises:
            InputError: another suffix, the rows hold what the file cannot, there is a file, or
                there can be none.
        """
        from truing import tablewriting
        from truing.core.files import expanded

        path = expanded(path)
        if path.suffix not in WRITTEN:
            raise InputError(f"a table is written as {', '.join(WRITTEN)}", where=str(path))
        tablewriting.write(self, path, new=new)
        return path

    def save(self, folder: str | Path) -> Path:
        """Write `table.parquet` into a folder, which is made where there is none."""
        return self.write(Path(folder) / "table.parquet")

    @classmethod
    def load(cls, folder: str | Path) -> Table:
        """Read what `save` wrote."""
        return cls.read(Path(folder) / "table.parquet")

    @classmethod
    def read(
        cls,
        source: str | Path,
        kind: str = "",
        *,
        limit: int = 0,
        columns: Mapping[str, str] | None = None,
    ) -> Table:
        """Read .jsonl, .csv (or .gz), .json, .parquet, a folder of the store, or a set's name.

        Args:
            source: path or name (`truing data` lists the names).
            kind: expected kind; "" infers it.
            limit: only the first so many rows; 0 for all.
            columns: to rename, new name to old, as "?prompt=question" behind `source` does.
        Raises:
            InputError: naming file, row and field of the first fault.
        """
        from truing import tablefiles

        return tablefiles.read(source, kind, limit=limit, columns=columns)


def row_id(row: Row) -> str:
    """Identity of a row: 16 hex digits over its content without id and lineage."""
    return content_hash({k: v for k, v in row.items() if k not in ("id", "lineage")}, 8)

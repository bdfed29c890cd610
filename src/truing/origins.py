"""What errors call a row: by the user's own file, as far as numbers, ids and lineage tell.

Rows that were read are called by their line. Those that a step of a run made or kept are stored
without it; a kept row has the id that it had before, a made one names its parents.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from truing.tables import Row, Table


class Origin:
    """A source of rows, such as a file.

    Args:
        source: what errors call it.
        numbers: of its rows; () counts from 1.
    """

    def __init__(self, source: str, numbers: Sequence[int] = ()) -> None:
        self.source, self._numbers = source, tuple(numbers)

    def number(self, i: int) -> int:
        """Number of row `i`, counted from 0."""
        return self._numbers[i] if self._numbers else i + 1

    def place(self, i: int) -> str:
        """ "pairs.jsonl row 12" for row `i`, counted from 0."""
        return f"{self.source} row {self.number(i)}"


class Joined(Origin):
    """Several tables, one after the other, as one source."""

    def __init__(self, tables: Sequence[Table]) -> None:
        super().__init__(tables[0].source)
        self._places = [(table, i) for table in tables for i in range(len(table))]

    def number(self, i: int) -> int:
        """Number of row `i` in its own table."""
        table, at = self._places[i]
        return table.number(at)

    def place(self, i: int) -> str:
        """What its own table calls row `i`."""
        table, at = self._places[i]
        return table.place(at)


def _same(a: Row, b: Row) -> bool:
    """True for rows of one content, whatever their ids and lineages."""
    from truing.tables import row_id

    try:
        rest = (a.keys() | b.keys()) - {"id", "lineage"}
        return all(bool(a.get(name) == b.get(name)) for name in rest)
    except ValueError:  # arrays are not simply equal
        return row_id(a) == row_id(b)


class Made(Origin):
    """What a step of a run made.

    Args:
        step: its name.
        rows: that it made or kept.
        inputs: the tables that it was given; ids of other files say nothing of these rows.
    """

    def __init__(self, step: str, rows: Sequence[Row], inputs: Sequence[Table]) -> None:
        super().__init__(f"step {step}")
        self._rows, self._inputs = rows, inputs

    @cached_property
    def _known(self) -> dict[object, list[tuple[Table, int]]]:
        """Where each id stands."""
        found: dict[object, list[tuple[Table, int]]] = {}
        for table in self._inputs:
            for i, row in enumerate(table.rows):
                found.setdefault(row["id"], []).append((table, i))
        return found

    def place(self, i: int) -> str:
        """ "pairs.jsonl row 12" for a kept row, "step answers row 3, from ..." for a made one.

        Rows of one id and other contents, as of two files that both count from 1, name none.
        """
        row, here = self._rows[i], super().place(i)
        for table, at in self._known.get(row["id"], ()):
            if _same(table[at], row):
                return table.place(at)
        lineage = cast("Row", row.get("lineage") or {})
        for parent in [row["id"], *cast("list[str]", lineage.get("parents") or [])]:
            found = self._known.get(parent, [])
            if found and all(_same(table[at], found[0][0][found[0][1]]) for table, at in found[1:]):
                table, at = found[0]
                return f"{here}, from {table.place(at)}"
        return here

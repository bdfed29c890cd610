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


class Made(Origin):
    """What a step of a run made.

    Args:
        step: its name.
        rows: that it made or kept.
        earlier: the run's tables before it, those that were read first.
    """

    def __init__(self, step: str, rows: Sequence[Row], earlier: Sequence[Table]) -> None:
        super().__init__(f"step {step}")
        self._rows, self._earlier = rows, earlier

    @cached_property
    def _known(self) -> dict[object, tuple[Table, int]]:
        """Where each id stood first."""
        found: dict[object, tuple[Table, int]] = {}
        for table in self._earlier:
            for i, row in enumerate(table.rows):
                found.setdefault(row["id"], (table, i))
        return found

    def place(self, i: int) -> str:
        """ "pairs.jsonl row 12" for a kept row, "step answers row 3, from ..." for a made one."""
        row, here = self._rows[i], super().place(i)
        if row["id"] in self._known:
            table, at = self._known[row["id"]]
            return table.place(at)
        lineage = cast("Row", row.get("lineage") or {})
        for parent in cast("list[str]", lineage.get("parents") or []):
            if parent in self._known:
                table, at = self._known[parent]
                return f"{here}, from {table.place(at)}"
        return here

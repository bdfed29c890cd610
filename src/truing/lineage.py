"""`truing why ROW`: which principle, generator, judge and filters made a row; and from a failing
sample of a report back to the training rows that touch its principle.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from truing import pipeline, runs
from truing.context import Json
from truing.errors import InputError
from truing.principles import Principles
from truing.reports import Report
from truing.store import Noun
from truing.tables import Row, Table, user_text

SHOWN = 5  # training rows listed for a failing sample
WIDTH = 160
FACTS = (
    "principle",
    "generator",
    "judge",
    "check",
    "filters",
    "rejected_because",
    "seed",
    "source",
)


@dataclass
class Found:
    """One row and where it came from.

    Args:
        id: of the row.
        row: its columns.
        made_by: the step that first made it.
        kept_by: later steps whose tables still hold it.
        principle: the rule that it is about, as text.
        parents: rows that it was made from, each with its own parents.
        training: rows that some training step saw and that touch the same principles.
    """

    id: str
    row: Row
    made_by: str = ""
    kept_by: list[str] = field(default_factory=list)
    principle: str = ""
    parents: list[Found] = field(default_factory=list)
    training: list[Found] = field(default_factory=list)

    @property
    def lineage(self) -> Row:
        """What the row itself says of its origin."""
        return cast(Row, self.row.get("lineage") or {})

    def to_json(self) -> dict[str, Json]:
        """Plain data."""
        return {
            "row": self.id,
            "made_by": self.made_by,
            "kept_by": list(self.kept_by),
            "principle": self.principle,
            "columns": {k: runs.plain(v) for k, v in self.row.items() if k != "lineage"},
            "lineage": {k: runs.plain(v) for k, v in self.lineage.items()},
            "parents": [p.to_json() for p in self.parents],
            "training_rows": [t.to_json() for t in self.training],
        }

    def text(self, indent: str = "") -> str:
        """For people."""
        lines = [f"{indent}{self.id}  made by {self.made_by}"]
        if self.kept_by:
            lines.append(f"{indent}  kept by   {', '.join(self.kept_by)}")
        for name, value in self.row.items():
            if name not in ("id", "lineage") and isinstance(value, (str, list)) and value:
                lines.append(f"{indent}  {name:<9} {_short(_shown(value))}")
        if self.principle:
            lines.append(f"{indent}  principle {self.principle}")
        for name in FACTS:
            value = self.lineage.get(name)
            if value not in (None, "", [], {}) and name != "principle":
                lines.append(f"{indent}  {name:<9} {_short(str(value))}")
        for parent in self.parents:
            lines += [f"{indent}  from:", parent.text(indent + "    ")]
        if self.training:
            lines.append(f"{indent}  trained on, for this principle:")
            lines += [t.text(indent + "    ") for t in self.training]
        return "\n".join(lines)


def _shown(value: object) -> str:
    """A column as text: of messages what the user says."""
    items = cast("list[object]", value) if isinstance(value, list) else []
    told = bool(items) and all(isinstance(m, dict) and "role" in m for m in items)
    return user_text(items) if told else str(value)


def _short(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= WIDTH else flat[: WIDTH - 3] + "..."


class Rows:
    """All rows of a run: of its tables, and of the samples behind its reports."""

    def __init__(
        self, results: Mapping[str, Noun], steps: Mapping[str, Mapping[str, Json]]
    ) -> None:
        self.steps = steps
        self.principles = {
            rule.id: rule.text
            for noun in results.values()
            if isinstance(noun, Principles)
            for rule in noun
        }
        self.tables = dict(self._tables(results))

    def _tables(self, results: Mapping[str, Noun]) -> Iterator[tuple[str, Table]]:
        for name, noun in results.items():
            if isinstance(noun, Table):
                yield name, noun
            elif isinstance(noun, Report) and noun.samples is not None:
                yield name, noun.samples

    def _label(self, step: str) -> str:
        return f"{step} ({self.steps[step]['method']})"

    def find(self, start: str) -> str:
        """The id that begins with `start`."""
        ids = {str(r["id"]) for t in self.tables.values() for r in t}
        near = sorted(i for i in ids if i.startswith(start)) if start else []
        if len(near) != 1 and start not in near:
            raise InputError(
                f"{len(near) or 'no'} row{'s have' if len(near) != 1 else ' has'} an id that "
                "begins so",
                where="why",
                seen=start,
                fix="Take an id from a table of the run or from a sample in its report",
            )
        return start if start in near else near[0]

    def trace(self, id: str, depth: int = 3) -> Found:
        """A row with its parents, `depth` generations back."""
        where = [n for n, t in self.tables.items() if any(r["id"] == id for r in t)]
        if not where:
            return Found(id, {}, "a source outside this run")
        # The last table that holds it has the whole lineage: filters add to it.
        row = next(r for r in self.tables[where[-1]] if r["id"] == id)
        found = Found(id, row, self._label(where[0]), [self._label(n) for n in where[1:]])
        named = str(found.lineage.get("principle") or "")
        found.principle = self.principles.get(named, named)
        if depth:
            parents = cast("list[str]", found.lineage.get("parents") or [])
            found.parents = [self.trace(p, depth - 1) for p in parents]
        return found

    def training_tables(self) -> list[str]:
        """Tables that training steps took in."""
        named = [
            source
            for step in self.steps.values()
            if step.get("verb") == "train"
            for sources in cast("dict[str, list[str]]", step["inputs"]).values()
            for source in sources
        ]
        return [n for n in dict.fromkeys(named) if n in self.tables]

    def touching(self, principles: set[str]) -> list[Found]:
        """Training rows that are about one of the principles."""
        rows = [
            str(row["id"])
            for name in self.training_tables()
            for row in self.tables[name]
            if cast(Row, row.get("lineage") or {}).get("principle") in principles
        ]
        return [self.trace(i, 0) for i in rows[:SHOWN]]


def why(row: str, *, run: str | Path = "") -> Found:
    """Where a row of a run came from.

    Args:
        row: its id, or the beginning of it.
        run: the run's folder; by default the last one in `runs`.
    Raises:
        InputError: no such run or row.
    """
    folder = Path(run) if run else runs.latest()
    steps = cast("dict[str, dict[str, Json]]", runs.read(folder)["steps"])
    rows = Rows(pipeline.load_results(folder), steps)
    found = rows.trace(rows.find(row))
    broken = {str(p) for p in cast("list[object]", found.lineage.get("principles") or [])}
    if broken:
        found.training = rows.touching(broken)
    return found

"""`truing why ROW`: which principle, generator, judge and filters made a row; and from a failing
sample of a report back to the training rows that touch its principle.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from truing import pipeline, runs
from truing.context import Json
from truing.core.held_out import INPUT
from truing.errors import InputError
from truing.jsontext import plain
from truing.output import printable
from truing.principles import Principles
from truing.reports import Report
from truing.store import Noun, Store
from truing.tables import Row, Table, row_id, user_text

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


def lineage_of(row: Row) -> Row:
    """A row's lineage, {} when it has none."""
    found = row.get("lineage")
    return cast("Row", found) if isinstance(found, Mapping) else {}


def parents(row: Row) -> list[str]:
    """Ids of the rows that this one was made from."""
    found = lineage_of(row).get("parents")
    return [str(p) for p in cast("Sequence[object]", found)] if isinstance(found, list) else []


def touched(row: Row) -> list[str]:
    """Principles that a row is about, by itself or by its lineage."""
    lineage = lineage_of(row)
    several = lineage.get("principles")
    ids = [str(p) for p in cast("Sequence[object]", several)] if isinstance(several, list) else []
    own = [str(p) for p in (row.get("principle"), lineage.get("principle")) if p not in (None, "")]
    return list(dict.fromkeys([*own[:1], *ids]))


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
        return lineage_of(self.row)

    def to_json(self) -> dict[str, Json]:
        """Plain data."""
        return {
            "row": self.id,
            "made_by": self.made_by,
            "kept_by": list(self.kept_by),
            "principle": self.principle,
            "columns": {k: plain(v) for k, v in self.row.items() if k != "lineage"},
            "lineage": {k: plain(v) for k, v in self.lineage.items()},
            "parents": [p.to_json() for p in self.parents],
            "training_rows": [t.to_json() for t in self.training],
        }

    def text(self, indent: str = "") -> str:
        """For people."""
        lines = [f"{indent}{self.id}  made by {self.made_by}"]
        if self.kept_by:
            lines.append(f"{indent}  kept by   {', '.join(self.kept_by)}")
        for name, value in self.row.items():
            if name not in ("id", "lineage") and (said := _shown(value)):
                lines.append(f"{indent}  {name:<9} {_short(said)}")
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
        return printable("\n".join(lines))


def _shown(value: object) -> str:
    """A column as text: of messages what the user says; "" where there is nothing."""
    if value is None or (isinstance(value, (list, dict)) and not value):
        return ""
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
        self._places: dict[str, list[list[str]]] = {}  # by id: see `places`
        self.lost = [n for n, step in steps.items() if step["key"] and n not in results]
        # The first row of an id, by steps.
        self._rows = {
            n: {str(row["id"]): row for row in reversed(t.rows)} for n, t in self.tables.items()
        }

    def _tables(self, results: Mapping[str, Noun]) -> Iterator[tuple[str, Table]]:
        for name, noun in results.items():
            if isinstance(noun, Table):
                yield name, noun
            elif isinstance(noun, Report) and noun.samples is not None:
                yield name, noun.samples

    def _label(self, step: str) -> str:
        return f"{step} ({self.steps[step]['method']})"

    def find(self, start: str) -> tuple[str, str]:
        """The id that begins with `start`, and a step that holds it; `start` may be STEP/ID."""
        step, _, rest = start.partition("/")
        meant = [step] if rest and step in self._rows else list(self._rows)
        start = rest if meant == [step] else start
        near = sorted({i for s in meant for i in self._rows[s] if i.startswith(start) and start})
        if len(near) != 1 and start not in near:
            raise InputError(
                f"{len(near) or 'no'} row{'s have' if len(near) != 1 else ' has'} an id that "
                "begins so",
                where="why",
                seen=start,
                fix="Take an id from a table of the run or from a sample in its report",
            )
        id = start if start in near else near[0]
        holding = [s for s in meant if id in self._rows[s]]
        together = self.places(id, holding[0])
        if others := [s for s in holding if s not in together]:
            raise InputError(
                "rows of different files have this id",
                where="why",
                seen=id,
                fix=f"Say which is meant: {holding[0]}/{id} or {others[0]}/{id}",
            )
        return id, holding[0]

    def _feeding(self, step: str) -> list[str]:
        """Steps whose rows a step was given."""
        inputs = cast("dict[str, list[str]]", self.steps[step]["inputs"])
        return [s for sources in inputs.values() for s in sources if s in self._rows]

    def places(self, id: str, step: str) -> list[str]:
        """All steps that hold the row which one of them holds, in order.

        Rows of another file may have the same id: those are other rows. A step has the row that
        those which feed it have, however it changed it, unless they have several; and equal ones.
        """
        if id not in self._places:
            self._places[id] = self._apart(id)
        return next(group for group in self._places[id] if step in group)

    def _apart(self, id: str) -> list[list[str]]:
        """The steps that hold an id, those together that hold the same row."""
        own = {s: row_id(rows[id]) for s, rows in self._rows.items() if id in rows}
        found: list[list[str]] = []
        for one in own:
            feeding = set(self._feeding(one))
            fed = [group for group in found if feeding & set(group)]
            near = fed if len(fed) == 1 else []
            near += [g for g in found if g not in near and own[one] in {own[s] for s in g}]
            merged = [s for s in own if s == one or any(s in g for g in near)]
            found = [*(g for g in found if g not in near), merged]
        return found

    def above(self, id: str, where: Sequence[str]) -> str:
        """A step that holds a parent of the row which `where` holds, whose steps were given it.

        "" where none of them does.
        """
        for step in where:
            feeding = self._feeding(step)
            for one in feeding:
                feeding += [s for s in self._feeding(one) if s not in feeding]
            for one in (*feeding, step):
                if id in self._rows[one]:
                    return one
        return ""

    def row(self, id: str, where: Sequence[str]) -> Row:
        """The row that these steps hold; the last has the whole lineage: filters add to it."""
        return self._rows[where[-1]][id]

    def trace(self, id: str, step: str, depth: int = 3) -> Found:
        """A row that a step holds, with its parents, `depth` generations back."""
        where = self.places(id, step)
        row = self.row(id, where)
        found = Found(id, row, self._label(where[0]), [self._label(n) for n in where[1:]])
        named = str(found.lineage.get("principle") or "")
        found.principle = self.principles.get(named, named)
        if depth:
            found.parents = [self._parent(p, where, depth - 1) for p in parents(row)]
        return found

    def _parent(self, id: str, where: Sequence[str], depth: int) -> Found:
        """A row that another one was made from, whose steps were given it."""
        if step := self.above(id, where):
            return self.trace(id, step, depth)
        lost = ", or a step whose result is not in the store" if self.lost else ""
        return Found(id, {}, f"a source outside this run{lost}")

    def training_tables(self) -> list[str]:
        """Tables that training steps learnt from; what was held out is none of them."""
        named = [
            source
            for step in self.steps.values()
            if str(step["method"]).startswith("train/")
            for name, sources in cast("dict[str, list[str]]", step["inputs"]).items()
            for source in sources
            if name != INPUT
        ]
        return [n for n in dict.fromkeys(named) if n in self.tables]

    def touching(self, principles: set[str]) -> list[Found]:
        """Training rows that are about one of the principles."""
        rows = [
            (str(row["id"]), name)
            for name in self.training_tables()
            for row in self.tables[name]
            if principles.intersection(touched(row))
        ]
        return [self.trace(*one, 0) for one in rows[:SHOWN]]


def why(row: str, *, run: str | Path = "") -> Found:
    """Where a row of a run came from.

    Args:
        row: its id, or the beginning of it; STEP/ID, where rows of different files have the id.
        run: the run's folder; by default the last one in `runs`.
    Raises:
        InputError: no such run or row, or results of the run are not in the store.
    """
    folder = Path(run) if run else runs.latest()
    steps = cast("dict[str, dict[str, Json]]", runs.read(folder)["steps"])
    rows = Rows(pipeline.load_results(folder), steps)
    try:
        found = rows.trace(*rows.find(row))
    except InputError:
        if not rows.lost:
            raise
        raise InputError(
            f"results of {len(rows.lost)} of {len(steps)} steps are not in the store",
            where=str(Store().root),
            seen=rows.lost,
            fix="Run the recipe again, or set TRUING_HOME to where it ran",
        ) from None
    broken = {str(p) for p in cast("list[object]", found.lineage.get("principles") or [])}
    if broken:
        found.training = rows.touching(broken)
    return found

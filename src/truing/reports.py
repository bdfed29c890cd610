"""`Report`: measured values with intervals, per category, with the samples behind them."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from truing import jsontext
from truing.context import Json
from truing.core.files import expanded
from truing.errors import InputError, unknown
from truing.faults import placing
from truing.surrogates import mended
from truing.tables import Table, content_hash

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Measure:
    """One measured value.

    Args:
        name: what was measured, such as "violation rate".
        value: the estimate.
        lo, hi: its 95 % interval; equal to `value` where there is none to state: no sampling error,
            or one observation, of which no spread is known. Reports then show the value alone.
        n: number of samples behind it.
        unit: "share", "difference of shares", "nats per token", "words", ...
        category: principle id, task or sub-category; "" for all.
        better: "lower", "higher" or "" when neither is.
    """

    name: str
    value: float
    lo: float
    hi: float
    n: int
    unit: str = ""
    category: str = ""
    better: str = ""


def _numbers(measure: dict[str, float | None]) -> dict[str, float]:
    """Value and interval as numbers: what is not known is null in the file, NaN here."""
    found = {n: measure[n] for n in ("value", "lo", "hi")}
    return {n: math.nan if v is None else v for n, v in found.items()}


class Report:
    """Measures, samples and facts of one evaluation; iterating gives the measures.

    Args:
        title: what was evaluated.
        measures: in the order in which they are shown.
        samples: the rows behind them, where the evaluation has any.
        meta: facts, as JSON has them, such as settings and "seconds".
    """

    def __init__(
        self,
        title: str,
        measures: Sequence[Measure],
        samples: Table | None = None,
        meta: dict[str, Json] | None = None,
    ) -> None:
        # A task's name or a reply may hold half a character, which no file takes.
        self.title, self.meta = mended(title), mended(dict(meta or {}))
        self.measures = tuple(Measure(**mended(asdict(m))) for m in measures)
        self.samples = samples

    def __iter__(self) -> Iterator[Measure]:
        return iter(self.measures)

    def __repr__(self) -> str:
        return f"Report({self.title!r}, {len(self.measures)} measures)"

    def get(self, name: str, category: str = "") -> Measure:
        """The measure of that name and category.

        Args:
            name: such as "violation rate".
            category: a principle's id, a task; "" for all.
        Raises:
            InputError: there is none; it lists what there is.
        """
        for measure in self.measures:
            if (measure.name, measure.category) == (name, category):
                return measure
        of = [m.category for m in self.measures if m.name == name]
        if not of:
            raise unknown("measure", name, {m.name for m in self.measures}, where=self.title)
        where, known = f"{self.title}: measure {name!r}", sorted(filter(None, of))
        if category and known:
            raise unknown("category", category, known, where=where)
        fix = f"Give the category: {', '.join(known[:20])}" if known else "Leave out the category"
        raise InputError("there is none of that category", where=where, seen=category, fix=fix)

    @property
    def key(self) -> str:
        """Content hash of measures, samples and facts, without times; as JSON holds them."""
        samples = self.samples.key if self.samples is not None else ""
        facts = {k: v for k, v in self.meta.items() if k != "seconds"}
        measures = [asdict(m) for m in self.measures]
        return content_hash(jsontext.finite([self.title, measures, samples, facts]))

    def to_json(self) -> dict[str, Json]:
        """Plain data without the samples."""
        return {
            "schema_version": SCHEMA_VERSION,
            "title": self.title,
            "measures": [asdict(m) for m in self.measures],
            "meta": self.meta,
        }

    @placing()
    def save(self, folder: str | Path) -> Path:
        """Write `report.json`, and the samples, if any, as `samples/table.parquet`."""
        path = expanded(folder) / "report.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        if self.samples is not None:
            self.samples.save(path.parent / "samples")
        else:  # those of an earlier report; whatever else is called so is the user's
            samples = path.parent / "samples" / "table.parquet"
            samples.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                samples.parent.rmdir()
        partial = path.with_suffix(".partial")
        partial.write_text(jsontext.dumps(self.to_json(), indent=1), "utf-8")
        os.replace(partial, path)
        return path

    @classmethod
    def load(cls, folder: str | Path) -> Report:
        """Read what `save` wrote.

        Raises:
            InputError: no report, or one of another schema version.
        """
        path = expanded(folder) / "report.json"
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            fix = "Give the folder of a report, such as the --out of `truing evaluate`"
            raise InputError(f"not a readable report: {error}", where=str(path), fix=fix) from None
        if data.get("schema_version") != SCHEMA_VERSION:
            raise InputError(
                f"report of another schema than {SCHEMA_VERSION}",
                where=str(path),
                seen=data.get("schema_version"),
                fix="Evaluate again with this version, or upgrade truing",
            )
        has_samples = (path.parent / "samples" / "table.parquet").is_file()
        samples = Table.load(path.parent / "samples") if has_samples else None
        measures = [Measure(**m | _numbers(m)) for m in data["measures"]]
        return cls(data["title"], measures, samples, data["meta"])


def check_same(reports: Mapping[str, Report], facts: Sequence[str], where: str) -> None:
    """Raise an InputError where reports that are set against one another were measured otherwise.

    Args:
        reports: by the names that errors give them.
        facts: of `meta`, which must be alike; a report that lacks one, as older ones do, passes.
    """
    for fact in facts:
        told = [(name, r.meta[fact]) for name, r in reports.items() if fact in r.meta]
        for name, other in told[1:]:
            first, one = told[0]
            if isinstance(one, dict) and isinstance(other, dict):
                sides = (one, other), (other, one)
                one, other = ({k: v for k, v in a.items() if b.get(k) != v} for a, b in sides)
            if one != other:
                raise InputError(
                    f"reports of other {fact!r} cannot be compared",
                    where=where,
                    seen={first: one, name: other},
                    fix="Measure all of them in the same way",
                )


def rows_of(found: Table | Report) -> Table:
    """The rows of a table, or the samples of a report; an InputError where it has none."""
    if isinstance(found, Table):
        return found
    if found.samples is None:
        fix = "Name a folder, for the measures themselves"
        raise InputError("this report has no samples", where=found.title, fix=fix)
    return found.samples

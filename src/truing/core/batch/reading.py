"""Tables as what an objective trains on: converted, made tokens, and its columns looked at."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from truing.context import Json
from truing.core.batch.measure import blank, columns_of
from truing.core.batch.row_kinds import as_kind, summed, takes_texts
from truing.core.batch.training_rows import Reader, Unit
from truing.core.chat import Prompt
from truing.core.modelfiles.loaded import Loaded
from truing.core.objective import Objective
from truing.core.trainer import distributed
from truing.core.trainer.start import room
from truing.core.training import Hook
from truing.errors import InputError, nearest
from truing.tables import Table, prompt_of

if TYPE_CHECKING:
    from truing.core.trainer.held_out_rows import HeldOutRows

ASKED = 256  # rows whose columns are looked at together


@dataclass(frozen=True)
class Read:
    """What was read of the tables.

    Args:
        units: that are trained on.
        held: those that are measured only, where there are any.
        notes: what to say of them.
    """

    units: list[Unit]
    held: HeldOutRows | None
    notes: dict[str, Json]

    @property
    def every(self) -> list[Unit]:
        """All of them."""
        return [*self.units, *(self.held.units if self.held is not None else ())]


def check_columns(
    spec: Objective, own: Mapping[str, object], units: Sequence[Unit], rows: Table
) -> None:
    """Raise an InputError that names the row whose columns the loss refuses."""

    def ask(some: Sequence[Unit]) -> None:
        other = "mismatched" in spec.needs
        some = [*some, *some] if other and len(some) < 2 else some  # compared with other rows
        trees = [u.tree(u.answers[:1] if other else ()) for u in some]
        width = max(sum(1 for _ in tree.rows()) for tree in trees)
        spec(blank(trees, spec.needs, columns_of(some, width, list(spec.columns))), own)

    if not spec.columns:
        return
    for start in range(0, len(units), ASKED):
        block = units[start : start + ASKED]
        try:
            ask(block)
        except InputError:
            number = {str(r["id"]): i for i, r in enumerate(rows.rows, 1)}
            with rows.naming():
                for unit in block:
                    try:
                        ask([unit])
                    except InputError as error:
                        error.where = f"{error.where} row {number[unit.id]}"
                        raise
            raise


def optional_columns(spec: Objective, rows: Table) -> dict[str, Json]:
    """How many rows have each column that a row may go without; another of its like is warned of.

    A column that is called otherwise would be missed in silence: its default stands in.
    """
    found: dict[str, Json] = {}
    for name in (n for n, default in spec.columns.items() if default is not None):
        values = (row.get(name) for row in rows)
        found[f"with_{name}"] = count = sum(v is not None and v == v for v in values)
        known = [c for c in rows.columns if c not in (*spec.columns, "id", "lineage")]
        turned = (c for c in known if sorted(c.split("_")) == sorted(name.split("_")))
        close = next(turned, nearest(name, known)) if not count else None
        if close is not None and distributed.leads():
            text = f"no row has the column {name!r}, which a row may go without; rename {close!r}"
            print(f"{spec.name}: warning: {text} if that is meant", file=sys.stderr)
    return found


def read_units(
    spec: Objective,
    loaded: Loaded,
    data: Table,
    limit: int,
    hook: Hook | None = None,
    own: Mapping[str, object] | None = None,
) -> tuple[list[Unit], dict[str, Json]]:
    """What will be trained on, and what to say of how it was made.

    Args:
        own: the objective's settings, which say what its columns may hold.
    """
    rows, notes = as_kind(data, spec.rows, spec.name, texts=takes_texts(spec))
    limit = room(loaded, limit)
    reader = Reader(loaded.tokenizer, spec, limit)
    if hook is not None and type(hook).rows is not Hook.rows:
        if rows.kind == "dialogue_pair":  # answers that are written anew are single ones
            rows = rows.expect(spec.rows, where=spec.name)
        rows = hook.rows(reader.usable(rows), reader)
    units = reader.read(rows)
    if "mismatched" in spec.needs and len(units) < 2:
        beside = " " in spec.name  # rows that are held out or mixed in, of whatever method
        other = "" if beside else ", or take train/apo_zero_unpaired, which compares none"
        raise InputError(
            "needs two rows at least: answers are compared with those of other rows",
            where=spec.name,
            seen=len(units),
            fix=f"Give more rows{other}",
        )
    check_columns(spec, own or {}, units, rows)
    given = optional_columns(spec, rows)
    if hook is not None:
        asks = any(n in rows.columns for n in ("prompt", "messages"))
        prompts = {str(r["id"]): cast(Prompt, prompt_of(r)) for r in rows if asks}
        units = hook.units(loaded, units, prompts, limit)
    counts = {n: c for n, c in sorted(reader.counts.items()) if c}
    return units, summed({"rows": len(units), **counts, **given}, notes)

"""Whether training could begin: settings and rows, before any model is fetched or step has run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from truing.core.row_kinds import CONVERSIONS
from truing.errors import InputError, nearest
from truing.tables import KINDS, Table

if TYPE_CHECKING:
    from truing.core.objective import Objective

BRANCHES = {"pair": 2, "group": 3}  # of a row of that kind; of all others one


def check_loss(spec: Objective, settings: Mapping[str, object]) -> None:
    """Raise what a loss itself says of its settings, by calling it on nothing but ones.

    Only losses of units that are computed one by one. Whatever else such a call says is of the
    ones, and means nothing.
    """
    import torch

    from truing.core.objective import Measurements

    if spec.unit == "batch":
        return
    own = {n: settings.get(n, p.default) for n, p in spec.settings.items()}
    mask_UKT = torch.ones(2, BRANCHES.get(spec.rows, 1) + len(spec.texts), 2)
    columns = {n: torch.full((2,), 1.0 if d is None else d) for n, d in spec.columns.items()}
    try:
        spec(Measurements(mask_UKT, dict.fromkeys(spec.needs, -mask_UKT), columns), own)
    except (RuntimeError, LookupError, ValueError) as error:
        if isinstance(error, InputError) and error.message.startswith("setting "):
            raise


def check_rows(table: Table, kind: str, where: str, columns: Iterable[str] = ()) -> None:
    """Raise an InputError unless the rows are of `kind`, or of one that is converted to it.

    Args:
        columns: further ones that each row must have.
    """
    if (table.kind, kind) in CONVERSIONS or (table.kind, kind) == ("dialogue_pair", "pair"):
        return  # a conversion makes what is missing
    try:
        table.expect(kind, where=where)
    except InputError as error:
        error.fix = _meant(table, kind) or error.fix
        raise
    for name in columns:
        if name not in table.columns:
            close = nearest(name, [c for c in table.columns if c not in ("id", "lineage")])
            raise InputError(
                f"needs the column {name!r} in {table.source}",
                where=where,
                seen=[c for c in table.columns if c not in ("id", "lineage")],
                fix=f"Did you mean {name!r} by {close!r}?" if close else "",
            )


def _meant(table: Table, kind: str) -> str:
    """What a misspelt column was meant to be; "" where none is like one that is missing."""
    have = set(table.columns) - {"id", "lineage"}
    for needed in sorted(KINDS[kind], key=lambda n: len(set(n) - have)):
        spare = sorted(have - set(needed))
        found = [(name, nearest(name, spare)) for name in needed if name not in have]
        if found and all(close for _, close in found):
            return "; ".join(f"Did you mean {name!r} by {close!r}?" for name, close in found)
    return ""

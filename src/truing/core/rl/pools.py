"""Pools of a method: rows of several sorts, how they are made and which of their rows can be used.

See `core.rl.collect.Pool` for what a pool does while a model is trained.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from inspect import signature
from typing import TYPE_CHECKING, cast

from truing import catalogue
from truing.core.batch.row_kinds import nothing_left
from truing.errors import InputError
from truing.method import get_component, resolve
from truing.tables import Row, Table

if TYPE_CHECKING:
    from truing.core.online import Online
    from truing.core.rl.collect import Pool


def pool_of(spec: Online, values: Mapping[str, object]) -> Pool | None:
    """The method's own way to ask and reward, with those of its settings that it takes."""
    if not spec.pools:
        return None
    entry = catalogue.components("pool")[spec.pools]
    function, _ = resolve("pool", {"use": entry.name})
    takes = {n: v for n, v in values.items() if n in signature(function).parameters}
    return cast("Pool", get_component("pool", {"use": entry.name, **takes})())


def why_unused(pool: Pool, row: Row, where: str) -> str:
    """Why the pool leaves a row out, or ""; an InputError at `where` for one that is wrong."""
    try:
        return pool.check(row)
    except InputError as error:
        raise InputError(error.message, where=where, seen=error.seen, fix=error.fix) from None


def check_pool(pool: Pool, table: Table, where: str) -> None:
    """Raise an InputError for the first wrong row, or where no row can be used."""
    whys = [why_unused(pool, row, f"{where} {table.place(i)}") for i, row in enumerate(table)]
    if whys and all(whys):
        raise nothing_left(table, Counter(whys), where)

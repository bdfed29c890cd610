"""What a Python call is given for a method's inputs: nouns, what names them, or rows.

A text or a path is opened as a recipe would open it. Rows are a list of dicts, a `datasets.Dataset`
or an Arrow table. Whatever else is refused by the name of the input.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, cast

from truing.errors import InputError
from truing.models import Model
from truing.naming import is_reference, referred_model
from truing.principles import Principles
from truing.remedies import SEVERAL, objects
from truing.reports import Report
from truing.signature import Input
from truing.sources import open_noun
from truing.tablefiles import told_apart
from truing.tables import Table

if TYPE_CHECKING:
    from truing.method import Method
    from truing.store import Noun

NOUNS = {"Model": Model, "Table": Table, "Principles": Principles, "Report": Report}


def by_name(
    method: Method, nouns: Sequence[object], values: Mapping[str, object]
) -> dict[str, object]:
    """What is given for each input, by position or by name.

    Raises:
        InputError: too many, one twice, or one missing that there must be.
    """
    inputs = method.inputs
    if len(nouns) > len(inputs):
        raise InputError(
            f"takes {len(inputs)} inputs",
            where=method.id,
            seen=len(nouns),
            fix=f"They are {', '.join(inputs) or 'none'}; settings are given by name",
        )
    named = dict(zip(inputs, nouns, strict=False))
    for name in inputs:
        if name in values and name in named:
            fix = f"The first inputs are {', '.join(named)}: give it by place or by name"
            raise InputError(f"input {name!r} is given twice", where=method.id, fix=fix)
    named |= {n: v for n, v in values.items() if n in inputs}
    for name, wanted in inputs.items():
        if named.get(name) is None and not wanted.optional:
            raise InputError(
                f"input {name!r} ({wanted.noun}) is missing",
                where=method.id,
                fix=objects(wanted.noun),
            )
    return named


def opened(
    method: Method, named: Mapping[str, object], check: Callable[[Mapping[str, Table]], None]
) -> dict[str, object]:
    """The nouns of each input. Tables first: data is checked before models are opened.

    Args:
        named: see `by_name`.
        check: called with the tables, before any model is opened.
    Raises:
        InputError: something is no noun of its input's sort and names none, or a table is empty.
    """
    found: dict[str, object] = {}
    models = [n for n in named if method.inputs[n].noun == "Model"]
    for name in [n for n in named if n not in models]:
        found[name] = _of_input(method.inputs[name], named[name], method.id)
    need_rows(found, where=method.id)
    check({n: t for n, t in found.items() if isinstance(t, Table)})
    for name in models:
        found[name] = _of_input(method.inputs[name], named[name], method.id)
    return {name: found[name] for name in named}


def need_rows(nouns: Mapping[str, object], *, where: str = "") -> None:
    """Raise for a table without a row: no method can do anything with one, few say so clearly."""
    for name, given in nouns.items():
        several = isinstance(given, Mapping)
        tables = cast("Mapping[str, object]", given).values() if several else [given]
        for table in tables:
            if isinstance(table, Table) and not len(table):
                step = table.source.startswith("step ")
                raise InputError(
                    f"input {name!r} has no rows: {table.source} "
                    + ("left none" if step else "is empty"),
                    where=where,
                    fix="Change the settings there" if step else "Give a table with rows",
                )


def _of_input(wanted: Input, value: object, where: str) -> Noun | Mapping[str, Noun] | None:
    place = f"input {wanted.name!r}"
    if value is None:
        return None
    if is_reference(wanted.name, value):
        return referred_model(wanted.name, cast("Mapping[str, object]", value), where=where)
    if not wanted.many:
        return as_noun(wanted.noun, value, place, where=where)
    return {
        role: as_noun(wanted.noun, one, f"{place} {role!r}", where=where)
        for role, one in _roles(value).items()
        if one is not None
    }


def _roles(value: object) -> dict[str, object]:
    """What an input that takes several is given, by role: its own names, else 0, 1, ..."""
    if isinstance(value, Mapping):
        return {str(k): v for k, v in cast("Mapping[object, object]", value).items()}
    several = isinstance(value, (list, tuple)) and rows_in(value) is None
    items = cast("Sequence[object]", value) if several else [value]
    return {str(i): one for i, one in enumerate(items)}


def as_noun(noun: str, value: object, place: str, *, where: str = "") -> Noun:
    """The noun that a value is, names or holds the rows of.

    Args:
        noun: "Model", "Table", ...; several as "Model|Table".
        place: what errors call it, such as "input 'data'".
        where: what it is given to.
    """
    sorts = noun.split("|")
    try:
        if isinstance(value, tuple(NOUNS[n] for n in sorts)):
            if isinstance(value, Table):
                value._key = ""  # pyright: ignore[reportPrivateUsage] - its rows may have changed
                return told_apart(value)
            return cast("Noun", value)
        if isinstance(value, (str, os.PathLike)):
            return open_noun(noun, os.fspath(cast("str", value)))
        rows = rows_in(value) if "Table" in sorts else None
        if rows is not None:
            return told_apart(Table("", rows, where=place, allow_empty=False))
    except InputError as error:
        error.where = f"{where}: {error.where}".strip(": ")
        raise
    kind = type(value)
    raise InputError(
        f"{place} takes a {noun.replace('|', ' or a ')}",
        where=where,
        seen=f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins."),
        fix=objects(noun) + (SEVERAL if "Table" in sorts and _several(value) else ""),
    )


def _several(value: object) -> bool:
    """Whether a mapping or list may hold tables, or names of some."""
    held = value.values() if isinstance(value, Mapping) else value
    nouns = (Table, str, os.PathLike)
    return isinstance(value, (Mapping, list, tuple)) and any(
        isinstance(one, nouns) for one in cast("Iterable[object]", held)
    )


def rows_in(value: object) -> list[Mapping[str, object]] | None:
    """The rows of a list of dicts, of a data set or of an Arrow table; None for anything else."""
    for name in ("to_list", "to_pylist"):  # of datasets.Dataset, of pyarrow.Table
        convert = getattr(value, name, None)
        if callable(convert):
            value = convert()
            break
    if not isinstance(value, (list, tuple)):
        return None
    rows = cast("Sequence[object]", value)
    if not all(isinstance(row, Mapping) for row in rows):
        return None
    return [cast("Mapping[str, object]", row) for row in rows]

"""Rows as they are read: what their columns hold, and whether that is what those of a kind do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

from truing.csvcells import WORDS
from truing.errors import InputError
from truing.kinds import ANSWERS, KINDS, TOOLS, Row
from truing.messages import plain_messages

if TYPE_CHECKING:
    import numpy as np

# Columns of texts and messages, in which NaN is how pandas writes that there is nothing.
SAID = WORDS | {TOOLS, "messages", "conversations", "history", "input", "system", "separator"}


def values_of(row: object, where: str) -> Row:
    """What a row says: numbers of numpy as plain ones, without None and, among texts, NaN.

    None is what Parquet gives for a missing field.
    Raises:
        InputError: it is no dict, or has names of columns that are no texts.
    """
    fix = 'Write {"column": value, ...}'
    if not isinstance(row, Mapping):
        raise InputError("a row must be a dict", where=where, seen=row, fix=fix)
    for name in cast("Mapping[object, object]", row):
        if not isinstance(name, str):
            raise InputError("names of columns must be texts", where=where, seen=name, fix=fix)
    found = {name: _plain(value) for name, value in cast(Row, row).items()}
    return {name: v for name, v in found.items() if not _is_nothing(name, v)}


def _is_nothing(name: str, value: object) -> bool:
    return value is None or (isinstance(value, float) and value != value and name in SAID)


def _plain(value: object) -> object:
    """Scalars of numpy, also in a list, and arrays of texts or of anything, as Python's own."""
    sort = getattr(getattr(value, "dtype", None), "kind", "")
    if sort in ("O", "U") or (sort in ("b", "i", "u", "f") and not getattr(value, "ndim", 1)):
        value = cast("np.ndarray", value).tolist()
    if isinstance(value, list) and any(hasattr(v, "dtype") for v in cast("list[object]", value)):
        return [_plain(v) for v in cast("list[object]", value)]
    return value


def _typed_fix(types: tuple[type, ...], value: object, where: str) -> str:
    """How a value of another type becomes one of `types`; "" where nothing is to be guessed."""
    if where.endswith((".csv", ".csv.gz")):  # which has no quotes and no lists
        if list in types:
            return "Save the rows as .jsonl, where a list is written [...]"
        return "Write a number there" if float in types else "Write true or false there"
    if bool in types:
        return "Write true or false" + (", without quotes" if isinstance(value, str) else "")
    if float in types and isinstance(value, str):
        return "Write the number without quotes"
    if str in types and isinstance(value, (bool, int, float)):
        return "Put quotes around it"
    if list in types:
        return "Write [...] around it: a list"
    if str in types and isinstance(value, list):
        return "Join it into one text"
    return ""


def check_row(row: Row, kind: str, where: str) -> None:
    """Raise an InputError naming row and field unless `row` is of `kind`.

    Messages in it become what `plain_messages` says.
    """
    if not isinstance(own := row.get("lineage", {}), Mapping):
        fix = "Rename the column"
        raise InputError("field 'lineage' is truing's, a mapping", where=where, seen=own, fix=fix)
    choices = KINDS[kind]
    need = next((c for c in choices if set(c) <= set(row)), choices[0])
    for field, types in need.items():
        if field not in row or row[field] is None:
            have = ", ".join(sorted(k for k in row if k not in ("id", "lineage")))
            raise InputError(
                f"field {field!r} is missing for a row of kind {kind!r}",
                where=where,
                fix=f"The row has: {have or 'nothing'}",
            )
        if types == (bool,) and type(row[field]) is int and row[field] in (0, 1):
            row[field] = bool(row[field])  # as Parquet, and TRL's sets, often have them
        if list in types and getattr(row[field], "ndim", 0):
            row[field] = cast("np.ndarray", row[field]).tolist()
        value = row[field]
        if not isinstance(value, types):
            wanted = " or ".join(t.__name__ for t in types)
            fix = _typed_fix(types, value, where)
            raise InputError(f"field {field!r} must be {wanted}", where=where, seen=value, fix=fix)
        if field in ("prompt", "messages", *ANSWERS) and isinstance(value, list):
            row[field] = plain_messages(cast(list[object], value), where, field)
        if field == "completions" and kind == "group":
            _check_texts(cast("list[object]", value), where)


def _check_texts(completions: list[object], where: str) -> None:
    """Raise an InputError for the first answer of a group that is no text."""
    for number, answer in enumerate(completions, 1):
        if not isinstance(answer, str):
            fix = "Write every answer as a text"
            if isinstance(answer, list):
                fix += ": that of its last message; the turns before it go to the prompt"
            elif isinstance(answer, Mapping):
                names = [n for n in ("response", "content", "text") if n in answer]
                fix += f": what its {names[0]!r} holds" if names else ""
            raise InputError(
                f"field 'completions' has an answer that is no text, the {number}. of them",
                where=where,
                seen=answer,
                fix=f"{fix}. An empty one is an empty text" if answer is None else fix,
            )

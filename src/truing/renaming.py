"""Columns that are called otherwise: the names of kinds given to a user's own, as rows are read.

    rows.jsonl?prompt=question&completion=answer          wherever a table is named
    {file: rows.jsonl, columns: {prompt: question}}       below `data:` of a recipe, in Plan.table
    Table.read("rows.jsonl", columns={"prompt": "question"})

The name here stands first, the name there second. Rows are renamed before their kind is told, so
whatever follows (kind, ids, keys) is of the rows under their new names.
"""

from __future__ import annotations

import contextlib
import re
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import cast

from truing.core.files import expanded
from truing.errors import InputError, nearest, unknown
from truing.kinds import KINDS, Columns, Row

_PAIR = r"[^?&=#]+=[^?&=#]+"
_TOLD = re.compile(rf"(.+)\?({_PAIR}(?:&{_PAIR})*)", re.S)
_MARKS = re.compile("[%?&=#,]")  # written %3F and so on in a name of a column
_FIX = "Write NAME?prompt=question&completion=answer: the name here, then the column's own"
# What others call the columns of kinds; the first that a table has is offered.
_LIKE: dict[str, tuple[str, ...]] = {
    "prompt": ("question", "query", "instruction", "problem", "input", "user", "request", "q"),
    "completion": ("answer", "response", "output", "reply", "solution", "target", "assistant", "a"),
    "chosen": ("preferred", "better", "winner", "accepted", "good", "positive"),
    "rejected": ("dispreferred", "worse", "loser", "bad", "negative"),
    "label": ("kto_tag", "correct", "is_good", "good", "accepted", "feedback"),
    "messages": ("conversation", "conversations", "dialogue", "dialog", "chat", "turns"),
    "completions": ("responses", "answers", "candidates", "outputs"),
    "scores": ("ratings", "rewards", "grades"),
    "score": ("rating", "reward", "grade"),
    "steps": ("solution_steps", "reasoning", "completions"),
    "text": ("content", "document", "body"),
}
# By their order in a table nobody can tell which answer is the better one.
_JUDGED = ("chosen", "rejected", "label", "labels", "score", "scores")
_OPEN = "COLUMN"  # stands for a name that the user knows


def split(source: str) -> tuple[str, dict[str, str]]:
    """What a table is named by, and the columns that it is told to rename: new name to old.

    A file whose own name reads so is itself. The query of an address stays with it: columns stand
    behind its checksum.

    Raises:
        InputError: one name is given twice.
    """
    told = _TOLD.fullmatch(source)
    if told is None:
        return source, {}
    with contextlib.suppress(OSError):  # which a text is that is too long for a file's name
        if expanded(source).exists():
            return source, {}
    if source.startswith(("http://", "https://")) and "#" not in told[1]:
        return source, {}
    pairs = [pair.partition("=") for pair in told[2].split("&")]
    names = [(urllib.parse.unquote(new), urllib.parse.unquote(old)) for new, _, old in pairs]
    _check_once([new for new, _ in names], told[1])
    return told[1], checked(dict(names), where=told[1])


def written(source: str, columns: Mapping[str, str]) -> str:
    """The text of a table and its renamed columns, as `split` reads it."""

    def plain(name: str) -> str:
        return _MARKS.sub(lambda mark: f"%{ord(mark[0]):02X}", name)

    pairs = "&".join(f"{plain(new)}={plain(old)}" for new, old in columns.items())
    return f"{source}?{pairs}" if pairs else source


def checked(columns: object, *, where: str) -> dict[str, str]:
    """Columns to rename, new name to old; an InputError for what cannot be done."""
    items = cast("Mapping[object, object]", columns if isinstance(columns, Mapping) else {"": ""})
    if not all(isinstance(n, str) and n for pair in items.items() for n in pair):
        raise InputError(
            "columns are renamed by a mapping of names to names",
            where=where,
            seen=columns,
            fix="Write {prompt: question, completion: answer}: the name here, then the column's",
        )
    found = cast("dict[str, str]", dict(items))
    _check_once(list(found.values()), where)
    if "lineage" in found:
        fix = "Choose another name for it"
        raise InputError("'lineage' is truing's own column", where=where, seen=found, fix=fix)
    return found


def _check_once(names: Sequence[str], where: str) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        said = f"column {twice!r} is named twice"
        raise InputError(said, where=where, seen=list(names), fix=f"Name it once. {_FIX}")


def address(given: Mapping[str, object], *, where: str = "") -> str:
    """The text of {file: PATH, columns: {NEW: OLD}}, or {name: SET, ...}, as it stands for a table.

    Raises:
        InputError: neither or both of file and name, another field, or `columns` is no mapping.
    """
    fix = "Write {file: rows.jsonl, columns: {prompt: question}}; of a set, name in place of file"
    if other := next((n for n in given if n not in ("file", "name", "columns")), ""):
        raise unknown("field", other, ("file", "name", "columns"), where=where)
    places = [given[n] for n in ("file", "name") if given.get(n) is not None]
    if len(places) != 1 or not isinstance(places[0], str):
        raise InputError("rows have a file or the name of a set", where=where, seen=given, fix=fix)
    source, before = split(places[0])
    columns = checked(given.get("columns") or {}, where=where)
    return written(source, checked({**before, **columns}, where=where))


def header(names: Sequence[str], columns: Mapping[str, str], where: str) -> list[str]:
    """Names of columns under their new names; an InputError as of `renamed`."""
    _check_known(names, columns, where)
    turned = {old: new for new, old in columns.items()}
    row = _row(dict.fromkeys(names, ""), turned, where)
    return list(row)


def renamed(
    rows: Sequence[Row],
    columns: Mapping[str, str],
    where: str,
    numbers: Sequence[int] = (),
    known: Sequence[str] = (),
) -> list[Row]:
    """Rows under new names of columns, whose order stays.

    Args:
        columns: new name to old.
        where: what the rows are of.
        numbers: of the rows in it, for errors; () counts from 1.
        known: columns that there are, though no row may have them.
    Raises:
        InputError: no row has one of the columns, or a new name is that of another one.
    """
    if not columns:
        return list(rows)
    _check_known(list(dict.fromkeys([*known, *(n for r in rows for n in r)])), columns, where)
    turned = {old: new for new, old in columns.items()}
    counted = numbers or range(1, len(rows) + 1)
    return [_row(r, turned, f"{where} row {i}") for i, r in zip(counted, rows, strict=True)]


def _row(row: Row, turned: Mapping[str, str], where: str) -> Row:
    for old, new in turned.items():
        if old in row and row.get(new) is not None and new not in turned:
            raise InputError(
                f"column {new!r} is there already, and {old!r} is to be called so",
                where=where,
                seen=row[new],
                fix=f"Rename that one, too: ?{new}={old}&old_{new}={new}",
            )
    gone = {new for old, new in turned.items() if old in row and new not in turned}  # None there
    return {turned.get(name, name): value for name, value in row.items() if name not in gone}


def _check_known(names: Sequence[str], columns: Mapping[str, str], where: str) -> None:
    for new, old in columns.items():
        if old in names:
            continue
        error = unknown("column", old, names, where=where)
        error.seen = [name for name in names if name not in ("id", "lineage")]
        if new in names:
            error.fix = f"The name here stands first: ?{old}={new}"
        raise error


def advice(rows: Sequence[Row], kinds: Sequence[str]) -> str:
    """How columns of rows that are of none of the kinds are renamed, with their own names."""
    row = rows[0] if rows else {}
    choices = [needed for kind in kinds for needed in KINDS.get(kind, ()) if needed]
    offers = (_own_names(row, needed, guess) for guess in (False, True) for needed in choices)
    own = next(filter(None, offers), None)
    if own is None:
        return "Table.map makes them of others"
    return f"Rename yours as they are read, {written('NAME', own)!r}, or by Table.map"


def _own_names(row: Mapping[str, object], needed: Columns, guess: bool) -> dict[str, str]:
    """The row's own names of the columns that it lacks; {} where they do not tell.

    Args:
        guess: go by their order where the names say nothing.
    """
    lacking = [name for name in needed if name not in row]
    spare = [n for n in row if n not in (*needed, "lineage") and "id" not in _words(n)]
    found: dict[str, str] = {}

    def fitting(name: str) -> list[str]:
        return [n for n in spare if n not in found.values() and _holds(row[n], needed[name])]

    for name in lacking:
        fits = fitting(name)
        named = (n for word in (name, *_LIKE.get(name, ())) for n in fits if word in _words(n))
        if (close := next(named, None) or nearest(name, fits)) is not None:
            found[name] = close
    left = [name for name in lacking if name not in found]
    if left and not guess:
        return {}
    for name in left:
        found[name] = next(iter(fitting(name) if name not in _JUDGED else ()), _OPEN)
    return {n: found[n] for n in lacking} if set(found.values()) - {_OPEN} else {}


def _words(name: str) -> list[str]:
    return [name.lower(), *re.split(r"[\W_]+", name.lower())]


def _holds(value: object, types: tuple[type, ...]) -> bool:
    return isinstance(value, types) or (
        types == (bool,) and isinstance(value, (int, float)) and value in (0, 1)
    )

"""What the cells of a .csv file are, in which all is text.

    a column of numbers alone             numbers, as exactly as they are written
    a column of true and false alone      these, in capitals too, as spreadsheets save them
    completions, steps, messages, ...     JSON lists, where every kind of row has a list there
    prompt, chosen, rejected, completion  JSON lists of messages; any other text is itself
    all other columns                     texts

An empty cell is nothing; in a column of texts it is an empty text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import cast

from truing.errors import InputError
from truing.jsontext import loads_or_text
from truing.kinds import KINDS, TOOLS, Message, Row

LICENCE = "lineage.licence"  # what a .csv file keeps of a row's lineage
_TYPES: dict[str, set[type]] = {}
for _choices in KINDS.values():
    for _columns in _choices:
        for _column, _types in _columns.items():
            _TYPES.setdefault(_column, set()).update(_types)
# Columns that are texts whatever they hold: of all kinds, and names of things.
WORDS = {"id", "task", LICENCE} | {n for n, types in _TYPES.items() if str in types}
DIALOGUES = {n for n, types in _TYPES.items() if {str, list} <= types}
LISTS = {TOOLS, "history"} | {n for n, types in _TYPES.items() if types == {list}}
# As programs write them: 007 is the name of something.
NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
EXACT = 2**53  # from here on a float cannot hold every whole number


def typed(line: Mapping[str, object], kind: str, where: str) -> Row:
    """A line with the columns of truth and score as what they are, by which its kind is told.

    Raises:
        InputError: one of them holds something else.
    """
    row: Row = dict(line)
    judged = {"prompt", "completion", "label"} <= set(row)  # else a class, as of texts
    if "label" in row and (kind == "unpaired" or (not kind and judged)):
        text = str(row["label"]).strip().lower()
        if text not in ("true", "false", "1", "0"):
            raise InputError(
                "field 'label' must be true or false",
                where=where,
                seen=row["label"],
                fix="Rename the column if it says something else of the row",
            )
        row["label"] = text in ("true", "1")
    for field in {"score", "margin"} & set(row):
        try:
            row[field] = float(str(row[field])) if row[field] != "" else None
        except ValueError:
            raise InputError(
                f"field {field!r} must be a number",
                where=where,
                seen=row[field],
                fix="Leave the cell empty where there is none",
            ) from None
    return row


def as_values(lines: Iterator[tuple[int, Row]]) -> Iterator[tuple[int, Row]]:
    """Lines of a .csv file with all cells as what they are.

    All lines are read before the first is given, so that a column is the same however much is
    taken of it.
    """
    items = list(lines)
    for name in dict.fromkeys(n for _, row in items for n in row):
        rows = [row for _, row in items if isinstance(row.get(name), str)]
        values = _values(name, [str(row[name]) for row in rows])
        for row, value in zip(rows, values, strict=True):
            row[name] = value
    for _, row in items:
        if licence := row.pop(LICENCE, None):
            row.setdefault("lineage", {"licence": licence})
    yield from items


def _values(name: str, texts: Sequence[str]) -> Sequence[object]:
    """The cells of a column; None for those that hold nothing."""
    if name in DIALOGUES:
        return [_messages(text) for text in texts]
    if name in WORDS:
        return texts
    told = set(texts) - {""}
    known = (_lists(told) if name in LISTS else {}) or _numbers(told) or _truths(told)
    return [known.get(text, text) if text else None for text in texts] if known else texts


def _messages(text: str) -> object:
    """Messages, where a text is nothing but these; else the text."""
    found = loads_or_text(text) if text.startswith("[") else None
    items = cast("list[object]", found) if isinstance(found, list) else []
    told = [cast(Message, m) for m in items if isinstance(m, Mapping) and "role" in m]
    whole = items and len(told) == len(items)
    return items if whole and all({"content", "tool_calls"} & set(m) for m in told) else text


def _lists(texts: set[str]) -> dict[str, object]:
    """The texts that are JSON lists; one that is none is named where its row is checked."""
    found = {text: loads_or_text(text) for text in texts if text.startswith("[")}
    return {text: value for text, value in found.items() if isinstance(value, list)}


def _numbers(texts: set[str]) -> dict[str, object]:
    """All of these texts as numbers; {} where one of them is none, or is too large for any."""
    if not all(map(NUMBER.fullmatch, texts)) or not all(math.isfinite(float(t)) for t in texts):
        return {}
    whole = {text: int(text) for text in texts if not set(".eE") & set(text)}
    alike = len(whole) == len(texts)  # else a column of floats, but for what none of them can hold
    return {
        text: whole[text] if alike or (text in whole and abs(whole[text]) >= EXACT) else float(text)
        for text in texts
    }


def _truths(texts: set[str]) -> dict[str, object]:
    """All of these texts as true and false; {} where one of them is neither."""
    low = {text: text.lower() for text in texts}
    if not set(low.values()) <= {"true", "false"}:
        return {}
    return {text: word == "true" for text, word in low.items()}

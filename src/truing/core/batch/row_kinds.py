"""Rows of one kind as rows of another, by named conversions.

A method that needs other rows than it is given gets them by one of these, which is recorded with
what it leaves out.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import TYPE_CHECKING, cast

from truing.context import Json
from truing.errors import InputError
from truing.kinds import KINDS, Row
from truing.readings import READINGS, read_completion, sides_of, single_answer
from truing.tables import Table

if TYPE_CHECKING:
    from truing.core.objective import Objective

WHYS = {
    "left_out_same": "chosen and rejected are the same",
    "left_out_empty": "an answer is empty",
    "left_out_thought": "an answer is a thought alone, in 'reasoning_content'",
    "left_out_muted": "every answer is muted, by weight 0 or train false",
    "left_out_unasked": "nothing is asked before the answer",
    "left_out_single": "the group has a single answer",
    "left_out_equal": "all answers have one score",
    "left_out_bad": "the answer is labelled as bad",
    "left_out_good": "the answer is labelled as good",
    "left_out_long": "the prompt leaves no room for an answer",
}
REMEDIES = {
    "left_out_same": "Give pairs whose answers differ",
    "left_out_empty": "Give answers with text",
    "left_out_thought": "Give what is said behind the thought as 'content'",
    "left_out_muted": "Take the marks off the answers that are to be learnt",
    "left_out_unasked": "Give what was asked as the user's message, or in a column 'prompt'",
    "left_out_single": "Give two answers or more to each prompt",
    "left_out_equal": "Give scores that differ within a group",
    "left_out_bad": "Give some that are labelled as good",
    "left_out_good": "Give some that are labelled as bad",
    "left_out_long": "Raise max_length, up to the model's context",
}
TEXTS = "whole texts: every token carries loss"
WHOLE = ("", "noisy_embeddings", "routers")  # hooks that ask for neither prompt nor answer
# What makes a row one of its kind; all else that it holds goes with it.
_OWN = {"id", "finished", "chosen_finished", "rejected_finished"} | (
    {c for choices in KINDS.values() for columns in choices for c in columns} - {"prompt"}
)


def _changed(row: Row, **columns: object) -> Row:
    """The row with other texts; what it holds besides (weights, margins, tasks) is kept."""
    kept = {name: value for name, value in row.items() if name not in _OWN}
    return kept | {"lineage": row.get("lineage") or {}} | columns


def endings(row: Row) -> list[bool]:
    """Whether each completion of a group came to its end; all did where nothing is said."""
    texts, said = cast("list[str]", row["completions"]), row.get("finished")
    if said is None:
        return [True] * len(texts)
    if not isinstance(said, list) or len(cast("list[object]", said)) != len(texts):
        raise InputError("column 'finished' must have one mark for each completion", seen=said)
    return [bool(end) for end in cast("list[object]", said)]


def scored_answers(row: Row) -> tuple[list[str], list[float]]:
    """Answers and scores of a group; an InputError unless there is one for each."""
    texts, scores = cast("list[str]", row["completions"]), cast("list[object]", row["scores"])
    numbers = [float(s) for s in scores if isinstance(s, (int, float)) and math.isfinite(s)]
    if len(numbers) != len(texts) or len(scores) != len(texts):
        raise InputError("column 'scores' must have one number for each completion", seen=scores)
    return texts, numbers


def group_why(texts: Sequence[str], scores: Sequence[float] | None) -> str:
    """Why nothing can be ranked in a group; "" where something can."""
    if not texts or not all(t.strip() for t in texts):
        return "left_out_empty"
    if len(texts) < 2:
        return "left_out_single"
    return "left_out_equal" if scores is not None and min(scores) == max(scores) else ""


def _pair_to_unpaired(row: Row) -> list[Row] | str:
    if row["chosen"] == row["rejected"]:
        return "left_out_same"
    return [
        _changed(row, completion=row[name], label=label, finished=row.get(f"{name}_finished", True))
        for name, label in (("chosen", True), ("rejected", False))
    ]


def _pair_to_group(row: Row) -> list[Row] | str:
    if row["chosen"] == row["rejected"]:
        return "left_out_same"
    finished = [row.get(f"{name}_finished", True) for name in ("chosen", "rejected")]
    texts = [row["chosen"], row["rejected"]]
    return [_changed(row, completions=texts, scores=[1.0, 0.0], finished=finished)]


def _pair_to_example(row: Row) -> list[Row] | str:
    finished = row.get("chosen_finished", True)
    return [_changed(row, completion=row["chosen"], finished=finished)]


def _pair_to_negative(row: Row) -> list[Row] | str:
    finished = row.get("rejected_finished", True)
    return [_changed(row, rejected=row["rejected"], rejected_finished=finished)]


def _unpaired_to_example(row: Row) -> list[Row] | str:
    if not row["label"]:
        return "left_out_bad"
    return [_changed(row, completion=row["completion"], finished=row.get("finished", True))]


def _judged_to_example(row: Row) -> list[Row] | str:
    """A dialogue that is marked as good, with all its answers."""
    if "completion" in row or not row["label"]:
        return _unpaired_to_example(read_completion(row))
    return [_changed(row, messages=row["messages"])]


def _unpaired_to_negative(row: Row) -> list[Row] | str:
    if row["label"]:
        return "left_out_good"
    finished = row.get("finished", True)
    return [_changed(row, rejected=row["completion"], rejected_finished=finished)]


def _dialogues_to_example(row: Row) -> list[Row] | str:
    asked, (chosen, _) = sides_of(row)
    made = _changed(row, messages=[*asked, *chosen])
    made.pop("prompt", None)  # which the messages begin with
    return [made]


def _group_to_pair(row: Row) -> list[Row] | str:
    texts, scores = scored_answers(row)
    if why := group_why(texts, scores):
        return why
    ends = endings(row)
    best, worst = scores.index(max(scores)), scores.index(min(scores))
    return [
        _changed(
            row,
            chosen=texts[best],
            rejected=texts[worst],
            chosen_finished=ends[best],
            rejected_finished=ends[worst],
        )
    ]


def _group_to_example(row: Row) -> list[Row] | str:
    texts, scores = scored_answers(row)
    if not texts:
        return "left_out_empty"
    best = scores.index(max(scores))
    return [_changed(row, completion=texts[best], finished=endings(row)[best])]


Change = Callable[[Row], "list[Row] | str"]  # the new rows, or why the row is left out
CONVERSIONS: dict[tuple[str, str], tuple[str, Change]] = {
    ("pair", "example"): ("chosen answers as examples", _pair_to_example),
    ("pair", "unpaired"): ("chosen answers as good, rejected ones as bad", _pair_to_unpaired),
    ("pair", "group"): ("pairs as groups of two", _pair_to_group),
    ("unpaired", "example"): ("good answers as examples", _unpaired_to_example),
    ("dialogue_unpaired", "example"): ("good dialogues as examples", _judged_to_example),
    ("pair", "negative"): ("rejected answers alone", _pair_to_negative),
    ("unpaired", "negative"): ("bad answers alone", _unpaired_to_negative),
    ("dialogue_pair", "example"): ("chosen dialogues as examples", _dialogues_to_example),
    ("group", "pair"): ("best against worst answer of each group", _group_to_pair),
    ("group", "example"): ("best answer of each group as example", _group_to_example),
}


def _reading(read: Callable[[Row], Row]) -> Change:
    return lambda row: [{n: v for n, v in read(row).items() if n != "id"}]


def _after(read: Callable[[Row], Row], change: Change) -> Change:
    """What is made of a row as it reads in another kind."""

    def made(row: Row) -> list[Row] | str:
        same = "chosen" in row and row["chosen"] == row["rejected"]  # which tells no prompt
        return "left_out_same" if same else change(read(row))

    return made


for (_given, _kind), (_name, _read) in READINGS.items():
    for (_from, _to), (_more, _change) in list(CONVERSIONS.items()):
        if _from == _kind:
            CONVERSIONS.setdefault((_given, _to), (f"{_name}; {_more}", _after(_read, _change)))
    if _given != "dialogue_pair":
        CONVERSIONS[_given, _kind] = (_name, _reading(_read))


def takes_texts(spec: Objective) -> bool:
    """Whether an objective learns whole texts, of which no part is a prompt or an answer."""
    return spec.rows == "example" and spec.hook in WHOLE


def _as_it_is(table: Table, kind: str, texts: bool) -> str | None:
    """What to say of rows that training reads without a conversion; None where it does not."""
    kinds = (table.kind, kind)
    if kinds == ("text", "example") and texts:
        return TEXTS
    if kinds == ("dialogue_pair", "pair"):
        return ""
    if kinds == ("dialogue_example", "example"):
        several = any(single_answer(row["completion"]) is None for row in table)
        return "" if several else None
    return None


def is_taken(given: str, kind: str, texts: bool = False) -> bool:
    """Whether `as_kind` takes rows of one kind for another, whatever their columns."""
    as_they_are = {("dialogue_pair", "pair")} | ({("text", "example")} if texts else set())
    return (given, kind) in CONVERSIONS or (given, kind) in as_they_are


def read_answers(table: Table, where: str) -> Table:
    """The table, single answers that are lists of messages read as texts.

    Raises:
        InputError: an answer of more than one plain message, with its row.
    """
    if table.kind not in ("dialogue_unpaired", "dialogue_example"):
        return table
    return table.expect(table.kind.removeprefix("dialogue_"), where=where)


def as_kind(
    table: Table, kind: str, where: str, *, texts: bool = False
) -> tuple[Table, dict[str, Json]]:
    """The table as rows of `kind`, and what to say of the conversion where one was made.

    Dialogues stay as they are where training reads them so.

    Args:
        texts: take whole texts as examples, of kind "text" still.
    Raises:
        InputError: rows of another kind, or of which nothing is left.
    """
    said = _as_it_is(table, kind, texts)
    if said is not None:
        return table, {"conversion": said} if said else {}
    # Conversions go first: good and bad answers have the columns of examples, and are none.
    if table.kind == kind or (table.kind, kind) not in CONVERSIONS:
        return table.expect(kind, where=where), {}
    name, change = CONVERSIONS[(table.kind, kind)]
    made: list[Row] = []
    places: list[int] = []
    counts: Counter[str] = Counter()
    for i, row in enumerate(table):
        try:
            new = change(row)
        except InputError as error:
            at = f"{where} {table.place(i)}"
            raise InputError(error.message, where=at, seen=error.seen, fix=error.fix) from None
        if isinstance(new, str):
            counts[new] += 1
        else:
            made += new
            places += [i] * len(new)
    if not made:
        raise nothing_left(table, counts, where)
    return table.remade(kind, made, places), {"conversion": name, **counts}


def common_kind(tables: Sequence[Table]) -> str:
    """The first table's kind, or one that it reads as, where all tables can be of that one."""
    first = tables[0].kind
    for kind in (first, *(read for given, read in READINGS if given == first)):
        if all(
            table.kind == kind
            or is_taken(table.kind, kind)
            or any(set(c) <= set(table.columns) for c in KINDS[kind])
            for table in tables
        ):
            return kind
    return first


def alike(table: Table, kind: str, where: str) -> tuple[Table, dict[str, Json]]:
    """As `as_kind`, and of `kind` alone: dialogues that training reads as they are become texts.

    The lineage of rows that are made anew names those that they were made from.
    """
    if (table.kind, kind) in CONVERSIONS:
        rows = [
            row | {"lineage": cast(Row, row["lineage"]) | {"parents": [row["id"]]}} for row in table
        ]
        table = table.remade(table.kind, rows, range(len(rows)))
    made, said = as_kind(table, kind, where)
    return (made if made.kind == kind else made.expect(kind, where=where)), said


def summed(one: Mapping[str, Json], two: Mapping[str, Json]) -> dict[str, Json]:
    """What two passes over the rows say together: what both have counted is added."""
    made = {**one, **two}
    for name, value in one.items():
        other = two.get(name)
        if isinstance(value, int) and isinstance(other, int):
            made[name] = value + other
    return made


def nothing_left(table: Table, counts: Mapping[str, int], where: str, limit: int = 0) -> InputError:
    """Says why no row of the table can be trained on; `limit` in tokens."""
    whys = WHYS | {"left_out_long": f"{WHYS['left_out_long']} within {limit} tokens"}
    told = [f"in {counts[n]} {why}" for n, why in whys.items() if counts.get(n)]
    return InputError(
        f"no row can be trained on of the {len(table)} of {table.source}: {'; '.join(told)}",
        where=where,
        seen=dict(counts),
        fix=". ".join(remedy for n, remedy in REMEDIES.items() if counts.get(n)),
    )


@contextlib.contextmanager
def of_row(where: str) -> Generator[None]:
    """Inside the block an error that names no place is one of this row."""
    try:
        yield
    except InputError as error:
        error.where = error.where or where
        raise


def no_prompt(where: str) -> InputError:
    """Says that a prompt has no token, from which the first of an answer would be drawn."""
    return InputError(
        "the prompt is empty, and the model's tokenizer has no template that would be its start",
        where=where,
        fix="Fill it in, leave the row out, or name the model with a template: NAME?template=FILE",
    )

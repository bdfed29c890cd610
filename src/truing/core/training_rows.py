"""Rows of a table as token branches: conversions between kinds, cutting, and what is left out.

A method that needs other rows than it is given gets them by a named conversion, which is recorded.
Answers that do not fit are cut at their end. Left out are rows without room for an answer, with an
empty answer (one of a group's is enough), or that prefer nothing: a chosen answer equal to the
rejected one, a group of one answer, or one of equal scores. All of it is counted.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from truing.context import Json
from truing.core.chat import Prompt, completion_ids, example_ids, prompt_ids, step_ids
from truing.core.objective import Objective
from truing.core.tree import Node, group_tree
from truing.errors import InputError
from truing.tables import Row, Table, prompt_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from truing.core.chat import Message

STEP = "\n\n"  # closes a step where a row does not say what does
ROOM = 4  # tokens that a prompt must leave for an answer
BRANCHES = {
    "pair": ("chosen", "rejected"),
    "unpaired": ("completion",),
    "example": ("completion",),
    "negative": ("rejected",),
    "judgement": ("completion",),
    "prompt": (),
}


@dataclass(frozen=True)
class Unit:
    """One row to train on.

    Args:
        id: of the row.
        prompt: token ids up to where an answer begins; () for a dialogue.
        answers: token ids of each branch.
        numbers: the row's numeric columns; a list holds one for each branch.
        dialogue: the tree of a row given as messages.
    """

    id: str
    prompt: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]
    numbers: Mapping[str, float | Sequence[float]]
    dialogue: Node | None = None

    def tree(self, more: Sequence[tuple[int, ...]] = ()) -> Node:
        """Its tree, with further answers to the same prompt."""
        if self.dialogue is not None:
            return self.dialogue
        return group_tree(self.prompt, [*self.answers, *more])

    @property
    def content(self) -> tuple[object, ...]:
        """What sorts units independently of their place: prompt and answers."""
        whole = self.dialogue
        return (self.prompt, self.answers, whole.ids if whole is not None else ())


WHYS = {
    "left_out_same": "chosen and rejected are the same",
    "left_out_empty": "an answer is empty",
    "left_out_single": "the group has a single answer",
    "left_out_equal": "all answers have one score",
    "left_out_bad": "the answer is labelled as bad",
    "left_out_good": "the answer is labelled as good",
    "left_out_long": "the prompt leaves no room for an answer",
}


def _plain(row: Row, **columns: object) -> Row:
    return {"prompt": row["prompt"], "lineage": row.get("lineage") or {}, **columns}


def _ranked(row: Row) -> tuple[list[str], list[float]]:
    """Answers and scores of a group; an InputError unless there is one for each."""
    texts, scores = cast("list[str]", row["completions"]), cast("list[object]", row["scores"])
    numbers = [float(s) for s in scores if isinstance(s, (int, float)) and math.isfinite(s)]
    if len(numbers) != len(texts) or len(scores) != len(texts):
        raise InputError("column 'scores' must have one number for each completion", seen=scores)
    return texts, numbers


def _group_why(texts: Sequence[str], scores: Sequence[float] | None) -> str:
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
        _plain(row, completion=row[name], label=label, finished=row.get(f"{name}_finished", True))
        for name, label in (("chosen", True), ("rejected", False))
    ]


def _pair_to_group(row: Row) -> list[Row] | str:
    if row["chosen"] == row["rejected"]:
        return "left_out_same"
    return [_plain(row, completions=[row["chosen"], row["rejected"]], scores=[1.0, 0.0])]


def _pair_to_example(row: Row) -> list[Row] | str:
    finished = row.get("chosen_finished", True)
    return [_plain(row, completion=row["chosen"], finished=finished)]


def _pair_to_negative(row: Row) -> list[Row] | str:
    finished = row.get("rejected_finished", True)
    return [_plain(row, rejected=row["rejected"], rejected_finished=finished)]


def _unpaired_to_example(row: Row) -> list[Row] | str:
    if not row["label"]:
        return "left_out_bad"
    return [_plain(row, completion=row["completion"], finished=row.get("finished", True))]


def _unpaired_to_negative(row: Row) -> list[Row] | str:
    if row["label"]:
        return "left_out_good"
    finished = row.get("finished", True)
    return [_plain(row, rejected=row["completion"], rejected_finished=finished)]


def _group_to_pair(row: Row) -> list[Row] | str:
    texts, scores = _ranked(row)
    if why := _group_why(texts, scores):
        return why
    best, worst = scores.index(max(scores)), scores.index(min(scores))
    return [_plain(row, chosen=texts[best], rejected=texts[worst])]


def _group_to_example(row: Row) -> list[Row] | str:
    texts, scores = _ranked(row)
    if not texts:
        return "left_out_empty"
    return [_plain(row, completion=texts[scores.index(max(scores))])]


# Each gives the new rows, or why the row is left out.
CONVERSIONS: dict[tuple[str, str], tuple[str, Callable[[Row], list[Row] | str]]] = {
    ("pair", "example"): ("chosen answers as examples", _pair_to_example),
    ("pair", "unpaired"): ("chosen answers as good, rejected ones as bad", _pair_to_unpaired),
    ("pair", "group"): ("pairs as groups of two", _pair_to_group),
    ("unpaired", "example"): ("good answers as examples", _unpaired_to_example),
    ("pair", "negative"): ("rejected answers alone", _pair_to_negative),
    ("unpaired", "negative"): ("bad answers alone", _unpaired_to_negative),
    ("group", "pair"): ("best against worst answer of each group", _group_to_pair),
    ("group", "example"): ("best answer of each group as example", _group_to_example),
}


def as_kind(table: Table, kind: str, where: str) -> tuple[Table, dict[str, Json]]:
    """The table as rows of `kind`, and what to say of the conversion where one was made.

    Raises:
        InputError: rows of another kind, or of which nothing is left.
    """
    # Conversions go first: good and bad answers have the columns of examples, and are none.
    if table.kind == kind or (table.kind, kind) not in CONVERSIONS:
        return table.expect(kind, where=where), {}
    name, change = CONVERSIONS[(table.kind, kind)]
    made: list[Row] = []
    counts: Counter[str] = Counter()
    for i, row in enumerate(table, 1):
        try:
            new = change(row)
        except InputError as error:
            at = f"{where} {table.source} row {i}"
            raise InputError(error.message, where=at, seen=error.seen) from None
        if isinstance(new, str):
            counts[new] += 1
        else:
            made += new
    if not made:
        raise nothing_left(table, counts, where)
    return Table(kind, made, where=table.source), {"conversion": name, **counts}


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
        fix="Raise max_tokens, up to the model's context" * bool(counts.get("left_out_long")),
    )


class Reader:
    """Turns rows into units for one objective, and counts what was cut or left out."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, spec: Objective, limit: int) -> None:
        self.tokenizer, self.spec, self.limit = tokenizer, spec, limit
        self.counts: Counter[str] = Counter()
        self._prompts: dict[str, tuple[int, ...]] = {}

    def read(self, table: Table) -> list[Unit]:
        """Units of all rows that can be trained on; an InputError when there is none."""
        units: list[Unit] = []
        for i, row in enumerate(table.rows):
            unit = self._unit(row, f"{table.source} row {i + 1}")
            if unit is not None:
                units.append(unit)
        if not units:
            raise nothing_left(table, self.counts, self.spec.name, self.limit)
        return units

    def _unit(self, row: Row, where: str) -> Unit | None:
        numbers = {name: self._number(row, name, where) for name in self.spec.columns}
        if self.spec.rows == "example" and "completion" not in row:
            return self._dialogue(row, numbers, where)
        if self.spec.rows == "steps":
            return self._steps(row, numbers, where)
        texts = self._texts(row, where)
        if why := self._why(row, texts):
            return self._out(why)
        prompt = self._prompt(prompt_of(row))
        room = self.limit - len(prompt)
        if room < ROOM:
            return self._out("left_out_long")
        whole = [tuple(completion_ids(self.tokenizer, t, end=end)) for t, end in texts]
        answers = tuple(ids[:room] for ids in whole)
        if self.spec.rows == "pair" and answers[0] == answers[1]:
            return self._out("left_out_same")
        self.counts["cut"] += sum(len(ids) > room for ids in whole)
        return Unit(str(row["id"]), prompt, answers, numbers)

    def usable(self, table: Table) -> Table:
        """The rows whose texts can teach something; the others are counted.

        For hooks that write the texts anew, in which an empty answer cannot be seen any more.
        """
        if self.spec.rows not in BRANCHES:
            return table
        rows: list[Row] = []
        for i, row in enumerate(table, 1):
            if self.spec.rows == "example" and "completion" not in row:
                rows.append(row)  # a dialogue
            elif why := self._why(row, self._texts(row, f"{table.source} row {i}")):
                self._out(why)
            else:
                rows.append(row)
        if not rows:
            raise nothing_left(table, self.counts, self.spec.name, self.limit)
        return table if len(rows) == len(table) else Table(table.kind, rows, where=table.source)

    def _why(self, row: Row, texts: Sequence[tuple[str, bool]]) -> str:
        """Why the row's texts teach nothing, or ""."""
        if any(not text.strip() for text, _ in texts):
            return "left_out_empty"
        if self.spec.rows == "pair" and texts[0][0] == texts[1][0]:
            return "left_out_same"
        if self.spec.rows == "group":
            scores = cast("list[float]", row["scores"]) if "scores" in self.spec.columns else None
            return _group_why(cast("list[str]", row["completions"]), scores)
        return ""

    def _out(self, why: str) -> None:
        self.counts[why] += 1

    def _texts(self, row: Row, where: str) -> list[tuple[str, bool]]:
        """(text, whether it came to its end) of each branch."""
        if self.spec.rows == "group":
            found = [(str(t), True) for t in cast("list[str]", row["completions"])]
        else:
            found = [
                (str(row[name]), bool(row.get(ending, True)))
                for name in BRANCHES[self.spec.rows]
                for ending in ("finished" if name == "completion" else f"{name}_finished",)
            ]
        for name, instead in self.spec.texts.items():
            text = row.get(name) or (row.get(instead) if instead else None)
            if not isinstance(text, str):
                raise InputError(
                    f"{self.spec.name} needs the column {name!r}", where=where, seen=row.get(name)
                )
            found.append((text, True))
        return found

    def _prompt(self, prompt: object) -> tuple[int, ...]:
        name = repr(prompt)
        if name not in self._prompts:
            self._prompts[name] = tuple(prompt_ids(self.tokenizer, cast(Prompt, prompt)))
        return self._prompts[name]

    def _dialogue(
        self, row: Row, numbers: Mapping[str, float | Sequence[float]], where: str
    ) -> Unit | None:
        messages = cast("list[Message]", row["messages"])
        try:
            ids, loss = example_ids(self.tokenizer, messages)
        except InputError as error:
            raise InputError(error.message, where=where, seen=error.seen, fix=error.fix) from None
        self.counts["cut"] += len(ids) > self.limit
        ids, loss = ids[: self.limit], loss[: self.limit]
        if not any(loss):
            return self._out("left_out_long")
        return Unit(str(row["id"]), (), (), numbers, Node(tuple(ids), tuple(loss)))

    def _steps(
        self, row: Row, numbers: Mapping[str, float | Sequence[float]], where: str
    ) -> Unit | None:
        """A row of steps: the token that closes each of them carries loss."""
        steps = cast("list[str]", row["steps"])
        if not steps or not all(isinstance(s, str) and s.strip() for s in steps):
            return self._out("left_out_empty")
        pieces = step_ids(self.tokenizer, steps, str(row.get("separator", STEP)))
        ids = [*self._prompt(row["prompt"])]
        loss = [False] * len(ids)
        for piece in pieces:
            ids += piece
            loss += [False] * (len(piece) - 1) + [True]
        self.counts["cut"] += len(ids) > self.limit
        ids, loss = ids[: self.limit], loss[: self.limit]
        n = sum(loss)
        if not n:
            return self._out("left_out_long")
        kept = {k: v[:n] if isinstance(v, list) else v for k, v in numbers.items()}
        return Unit(str(row["id"]), (), (), kept, Node(tuple(ids), tuple(loss)))

    def _number(self, row: Row, name: str, where: str) -> float | list[float]:
        value, default = row.get(name), self.spec.columns[name]
        if value is None and default is not None:
            return default
        many = value if isinstance(value, list) else [value]
        if not all(isinstance(v, (int, float)) and abs(v) < float("inf") for v in many):
            raise InputError(
                f"{self.spec.name} needs a finite number in column {name!r}",
                where=where,
                seen=value,
            )
        numbers = [float(cast(float, v)) for v in many]
        if not isinstance(value, list):
            return numbers[0]
        of = "step" if self.spec.rows == "steps" else "completion"
        if len(numbers) != len(cast("list[str]", row.get(f"{of}s", []))):
            raise InputError(
                f"column {name!r} must have one number for each {of}", where=where, seen=value
            )
        return numbers

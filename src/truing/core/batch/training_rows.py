"""Rows of a table as token branches: what is cut, and what is left out.

Answers that do not fit are cut at their end. Sides of a pair, and the completion of an example, may
be several messages: every turn of the assistant's after the prompt carries loss, after what both
sides begin with where no prompt is given, but those that are muted, which are context (`weight: 0`,
`train: false`). All of a whole text carries loss, but its first token.
An assistant's words that open a dialogue answer nothing, and carry none.
Left out are rows without room for an answer, with an empty answer, in which nothing is asked, or
that prefer nothing: a chosen answer equal to the rejected one, a group of one answer, or one of
equal scores. Of a group one empty answer is enough; of a dialogue all have to be, since an empty
turn among others carries no loss. Where a template takes no dialogue that the assistant opens, it
is left out as one in which nothing is asked. All of it is counted.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from truing.core.batch.row_kinds import endings, group_why, no_prompt, nothing_left, of_row
from truing.core.batch.turn_marks import COUNT, holds, turn_marks, warn
from truing.core.chat import (
    Prompt,
    answers_of,
    chat_text,
    completion_ids,
    example_ids,
    given_answer,
    opening,
    prompt_ids,
    says,
    step_ids,
    text_ids,
)
from truing.core.objective import Objective
from truing.core.tree import Node, alike, fork, group_tree
from truing.errors import InputError
from truing.kinds import Row, check_texts, muted, prompt_of, told
from truing.readings import read_pair, sides_of
from truing.tables import Table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from truing.core.chat import Message

STEP = "\n\n"  # closes a step where a row does not say what does
LARGEST = sys.float_info.max  # a whole number may be larger
SAID = ("prompt", "messages", "completion", "chosen", "rejected", "completions", "steps")
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
        dialogue: the tree of a row given as messages, or of two that part.
        asked: the prompt as the row has it; None for a dialogue of several answers, and a text.
    """

    id: str
    prompt: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]
    numbers: Mapping[str, float | Sequence[float]]
    dialogue: Node | None = None
    asked: Prompt | None = field(default=None, compare=False, repr=False)

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


def _whole_example(spec: Objective, row: Row) -> bool:
    """Whether a row to imitate is one run of tokens: messages or a text, not prompt and answer."""
    return spec.rows == "example" and not isinstance(row.get("completion"), str)


def _silent(messages: Sequence[Message], asked: int) -> str:
    """Why none of the answers among the messages says anything, or ""."""
    answers = [messages[i] for i in answers_of(messages, asked)]
    if not answers and any(muted(m) for m in messages[asked:]):
        return "left_out_muted"
    if not answers or any(says(m) for m in answers):
        return ""
    thought = any(m.get("reasoning_content") for m in answers)
    return "left_out_thought" if thought else "left_out_empty"


def _asked(sides: Sequence[Sequence[Message]], asked: int) -> Prompt | None:
    """What single answers answer; None where a side has several, or turns behind the first.

    Args:
        sides: of a dialogue, with the messages of the prompt.
        asked: how many messages are the prompt for certain.
    """
    single = all(answers_of(side, asked) == [len(side) - 1] for side in sides)
    prompts = [side[:-1] for side in sides]
    if not single or not prompts[0] or any(p != prompts[0] for p in prompts):
        return None
    return list(prompts[0])


class Reader:
    """Turns rows into units for one objective, and counts what was cut or left out."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, spec: Objective, limit: int) -> None:
        self.tokenizer, self.spec, self.limit = tokenizer, spec, limit
        self.counts: Counter[str] = Counter()
        self._prompts: dict[str, tuple[int, ...]] = {}

    def read(self, table: Table) -> list[Unit]:
        """Units of all rows that can be trained on; an InputError when there is none."""
        units = self.units(table)
        warn(self.counts[COUNT], len(table), self.tokenizer, self.spec.name)
        if not units:
            raise nothing_left(table, self.counts, self.spec.name, self.limit)
        return units

    def units(self, table: Table) -> list[Unit]:
        """Units of all rows that can be trained on, which may be none."""
        units: list[Unit] = []
        marks, names = turn_marks(self.tokenizer), (*SAID, *self.spec.texts)
        with table.naming():
            for i, row in enumerate(table.rows, 1):
                with of_row(f"row {i}"):
                    unit = self._unit(row, f"row {i}")
                if any(holds(row.get(name), marks) for name in names):
                    self.counts[COUNT] += 1
                if unit is not None:
                    units.append(unit)
        return units

    def _unit(self, row: Row, where: str) -> Unit | None:
        numbers = {name: self._number(row, name, where) for name in self.spec.columns}
        if _whole_example(self.spec, row):
            return self._dialogue(row, numbers, where)
        if self.spec.rows == "pair" and isinstance(row["chosen"], list):
            if not self.spec.texts:
                return self._dialogues(row, numbers, where)
            row = self._single(row, where)
        if self.spec.rows == "steps":
            return self._steps(row, numbers, where)
        texts = self._texts(row, where)
        if why := self._why(row, texts):
            return self._out(why)
        prompt = self._prompt(prompt_of(row))
        if not prompt:
            raise no_prompt(where)
        room = self.limit - len(prompt)
        if room < ROOM:
            return self._out("left_out_long")
        texts = [(given_answer(self.tokenizer, t, where, end=end), end) for t, end in texts]
        whole = [tuple(completion_ids(self.tokenizer, t, end=end)) for t, end in texts]
        answers = tuple(ids[:room] for ids in whole)
        if self.spec.rows == "pair" and answers[0] == answers[1]:
            return self._out("left_out_same")
        self.counts["cut"] += sum(len(ids) > room for ids in whole)
        asked = cast(Prompt, prompt_of(row))
        return Unit(str(row["id"]), prompt, answers, numbers, asked=asked)

    def usable(self, table: Table) -> Table:
        """The rows whose texts can teach something; the others are counted.

        For hooks that write the texts anew, in which an empty answer cannot be seen any more.
        """
        if self.spec.rows not in BRANCHES:
            return table
        kept: list[int] = []
        with table.naming():
            for i, row in enumerate(table):
                if _whole_example(self.spec, row):
                    kept.append(i)
                elif why := self._why(row, self._texts(row, f"row {i + 1}")):
                    self._out(why)
                else:
                    kept.append(i)
        if not kept:
            raise nothing_left(table, self.counts, self.spec.name, self.limit)
        return table if len(kept) == len(table) else table.take(kept)

    def _why(self, row: Row, texts: Sequence[tuple[str, bool]]) -> str:
        """Why the row's texts teach nothing, or ""."""
        if any(not text.strip() for text, _ in texts):
            return "left_out_empty"
        if self.spec.rows == "pair" and texts[0][0] == texts[1][0]:
            return "left_out_same"
        if self.spec.rows == "group":
            scores = cast("list[float]", row["scores"]) if "scores" in self.spec.columns else None
            return group_why(cast("list[str]", row["completions"]), scores)
        return ""

    def _out(self, why: str) -> None:
        self.counts[why] += 1

    def _texts(self, row: Row, where: str) -> list[tuple[str, bool]]:
        """(text, whether it came to its end) of each branch."""
        if self.spec.rows == "group":
            texts = cast("list[str]", row["completions"])
            found = [(str(t), end) for t, end in zip(texts, endings(row), strict=True)]
        else:
            found = [
                (str(row[name]), bool(row.get(ending, True)))
                for name in BRANCHES[self.spec.rows]
                for ending in ("finished" if name == "completion" else f"{name}_finished",)
            ]
        for name, instead in self.spec.texts.items():
            source = name if row.get(name) or not instead else instead
            text = row.get(source)
            if not isinstance(text, str):
                raise InputError(
                    f"{self.spec.name} needs the column {name!r}",
                    where=where,
                    seen=row.get(name),
                    fix="Give every row a text there",
                )
            found.append((text, bool(row.get(f"{source}_finished", True))))
        return found

    def _prompt(self, prompt: object) -> tuple[int, ...]:
        name = repr(prompt)
        if name not in self._prompts:
            self._prompts[name] = tuple(prompt_ids(self.tokenizer, cast(Prompt, prompt)))
        return self._prompts[name]

    def _single(self, row: Row, where: str) -> Row:
        """A pair of dialogues as one of texts, for objectives with further texts."""
        try:
            return read_pair(row)
        except InputError as error:
            told = f"{self.spec.name} {error.message}"
            raise InputError(told, where=where, seen=error.seen, fix=error.fix) from None

    def _dialogue(
        self, row: Row, numbers: Mapping[str, float | Sequence[float]], where: str
    ) -> Unit | None:
        """A row of messages, or a text, which is its own one branch."""
        if "text" in row and not {"messages", "completion"} & set(row):
            return self._text(row, numbers)
        if "messages" in row:
            asked, whole = 0, told(row["messages"], row)
            if self._unasked(whole):
                return self._out("left_out_unasked")
        else:
            given = told(row["prompt"], row)
            asked, whole = len(given), [*given, *cast("list[Message]", row["completion"])]
        if why := _silent(whole, asked):
            return self._out(why)
        ids, loss = self._whole(whole, asked, where)
        if not any(loss):
            return self._out("left_out_long")
        tree = Node(tuple(ids), tuple(loss))
        return Unit(str(row["id"]), (), (), numbers, tree, _asked([whole], asked))

    def _text(self, row: Row, numbers: Mapping[str, float | Sequence[float]]) -> Unit | None:
        check_texts(row)
        text = str(row["text"])
        ids = text_ids(self.tokenizer, text) if text.strip() else []
        if len(ids) < 2:
            return self._out("left_out_empty")
        self.counts["cut"] += len(ids) > self.limit
        ids = ids[: self.limit]
        loss = (False, *[True] * (len(ids) - 1))  # nothing predicts the first
        return Unit(str(row["id"]), (), (), numbers, Node(tuple(ids), loss))

    def _dialogues(
        self, row: Row, numbers: Mapping[str, float | Sequence[float]], where: str
    ) -> Unit | None:
        """A pair whose sides are messages: what both begin with is one run of tokens."""
        given, sides = sides_of(row)
        whole = [told([*given, *side], row) for side in sides]
        asked = len(whole[0]) - len(sides[0]) if given else alike(whole, keep=1)
        if whole[0] == whole[1]:
            return self._out("left_out_same")
        if not given and any(opening(s) > asked or self._unasked(s) for s in whole):
            return self._out("left_out_unasked")
        if why := next(filter(None, (_silent(side, asked) for side in whole)), ""):
            return self._out(why)
        rows = [self._whole(side, asked, where) for side in whole]
        if rows[0] == rows[1] and len(rows[0][0]) < self.limit:  # but for an empty turn at the end
            return self._out("left_out_same")
        if not all(any(loss) for _, loss in rows) or rows[0] == rows[1]:
            return self._out("left_out_long")
        return Unit(str(row["id"]), (), (), numbers, fork(rows), _asked(whole, asked))

    def _unasked(self, messages: Sequence[Message]) -> bool:
        """Whether an assistant opens a dialogue and is alone in it, or the template refuses that.

        Templates that begin with the user are those of Llama 2, Mistral and Gemma. What they refuse
        without the opening too is another fault, which `example_ids` names.
        """
        n = opening(messages)
        if not n or messages[n - 1].get("role") != "assistant":
            return False
        if n == len(messages):
            return bool(self.tokenizer.chat_template)  # without one no dialogue is taken
        without = [m for m in messages[:n] if m.get("role") != "assistant"] + list(messages[n:])
        return not self._writes(messages) and self._writes(without)

    def _writes(self, messages: Sequence[Message]) -> bool:
        try:
            chat_text(self.tokenizer, messages, answer=False)
        except InputError:
            return False
        return True

    def _whole(
        self, messages: Sequence[Message], asked: int, where: str
    ) -> tuple[list[int], list[bool]]:
        """Ids and loss marks of a dialogue, cut where it does not fit."""
        try:
            ids, loss = example_ids(self.tokenizer, messages, asked=asked)
        except InputError as error:
            raise InputError(error.message, where=where, seen=error.seen, fix=error.fix) from None
        self.counts["cut"] += len(ids) > self.limit
        return ids[: self.limit], loss[: self.limit]

    def _steps(
        self, row: Row, numbers: Mapping[str, float | Sequence[float]], where: str
    ) -> Unit | None:
        """A row of steps: the token that closes each of them carries loss."""
        steps = cast("list[str]", row["steps"])
        if not steps or not all(isinstance(s, str) and s.strip() for s in steps):
            return self._out("left_out_empty")
        separator = str(row.get("separator", STEP))
        said, end = separator.join(steps), bool(row.get("finished", True))
        # What ends a thought that the prompt has opened is no step of its own.
        closes = given_answer(self.tokenizer, said, where, end=end).removesuffix(said)
        pieces = step_ids(self.tokenizer, [closes + steps[0], *steps[1:]], separator)
        ids = [*self._prompt(prompt_of(row))]
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
        # Where a number may have no part in the loss, NaN is none, as pandas writes it.
        none = default == -math.inf and (value == default or value != value)
        if (value is None or none) and default is not None:
            return default
        many = value if isinstance(value, list) else [value]
        if not all(isinstance(v, (int, float)) and abs(v) <= LARGEST for v in many):
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

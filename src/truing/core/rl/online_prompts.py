"""What online methods ask: the prompts of rows, or an environment's tasks, checked with the model.

Template and memory are tried with a short answer to each before anything is drawn.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

from truing.context import Json, current
from truing.core.batch.row_kinds import as_kind, no_prompt, nothing_left, of_row, summed
from truing.core.batch.turn_marks import COUNT, holds, turn_marks, warn
from truing.core.chat import Prompt, completion_ids, prompt_ids
from truing.core.held_out import INPUT as HELD
from truing.core.online import Online
from truing.core.online_training import OnlineTraining
from truing.core.passes.memory import Beside
from truing.core.play.episodes import World
from truing.core.rl.answers import Asked
from truing.core.rl.collect import Pool
from truing.core.rl.online_mix import Added
from truing.core.rl.pools import why_unused
from truing.core.trainer import distributed
from truing.core.trainer.start import Start
from truing.core.tree import group_tree
from truing.errors import InputError
from truing.readings import last_answer
from truing.tables import Row, Table, as_prompt, row_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from truing.core.tree import Node


@dataclass(frozen=True)
class Prompts:
    """What is asked of one table.

    Args:
        asked: prompts in tokens; or tasks, whose environment makes the prompts.
        begun: the prompts, of tasks those that were tried.
        largest: tokens of the largest group of answers.
        notes: what to say of the rows.
    """

    asked: list[Asked]
    begun: Sequence[Sequence[int]]
    largest: int
    notes: dict[str, Json]

    def trees(self, tokenizer: PreTrainedTokenizerBase) -> list[Node]:
        """A short answer to each, by which template and masks are checked."""
        answer = completion_ids(tokenizer, "yes")
        return [group_tree(ids, [answer]) for ids in self.begun]

    def among(self, others: Prompts) -> int:
        """How many are also asked of the other table."""
        known = {one.ids or row_id(one.row) for one in others.asked}
        return sum((one.ids or row_id(one.row)) in known for one in self.asked)


@dataclass(frozen=True)
class Source:
    """How tables are asked.

    Args:
        given: column of an answer that joins each group; "" none.
        pool: what asks in its own words, where the method has one.
        world: where answers are played; None where they are of one turn.
    """

    spec: Online
    given: str
    settings: OnlineTraining
    start: Start
    pool: Pool | None
    world: World | None

    def read(self, table: Table, where: str, answers: int) -> Prompts:
        """The prompts or tasks of a table.

        Args:
            where: what errors name.
            answers: to each, an opponent's among them.
        """
        if self.world is not None:
            return self._tasks(table, replace(self.world, where=where), answers)
        settings, start = self.settings, self.start
        rows, said = as_kind(table, self.spec.rows, where)
        found, notes = read_prompts(
            rows,
            start.loaded.tokenizer,
            start.limit,
            settings.max_tokens,
            self.given,
            where,
            self.pool,
        )
        begun = [one.ids for one in found]
        largest = max(len(one.ids) + len(one.given) for one in found)
        largest += answers * settings.max_tokens
        return Prompts(found, begun, largest, summed(notes, said))

    def _tasks(self, table: Table, world: World, answers: int) -> Prompts:
        """Tasks, whose prompts their environment makes; some are begun, to see that it can."""
        settings, limit = self.settings, self.start.limit
        tokenizer, seed = self.start.loaded.tokenizer, current().stream("tried")
        begun = world.tried(tokenizer, [(r, seed) for r in table.rows], settings.max_tokens)
        longest = max(map(len, begun))
        # Of replies nothing is known yet: as long as the first prompt, by way of a forecast.
        grown = settings.turns * (settings.max_tokens + longest)
        largest = longest + answers * min(limit - longest, grown)
        asked = [Asked(row, ()) for row in table.rows]
        return Prompts(asked, begun, largest, {"rows": len(asked)})


def check(
    start: Start, prompts: Prompts, held: Prompts | None, beside: Beside, added: Added | None
) -> None:
    """Check template and memory with a short answer to each prompt, and what is learnt beside.

    Args:
        held: prompts that are answered meanwhile and not trained on.
    """
    tokenizer = start.loaded.tokenizer
    trees, largest, notes = prompts.trees(tokenizer), prompts.largest, dict(prompts.notes)
    if held is not None:
        notes |= {f"{HELD}_{name}": value for name, value in held.notes.items()}
    if added is not None:
        trees += added.trees
        largest, notes = max(largest, *(t.size for t in added.trees)), {**notes, **added.notes}
    start.check(
        trees,
        largest,
        notes,
        beside=beside,
        held=held.trees(tokenizer) if held is not None else (),
        held_largest=held.largest if held is not None else 0,
    )
    twice = held.among(prompts) if held is not None else 0
    if held is not None and twice and distributed.leads():
        text = f"{start.where} {HELD}: warning: {twice} of {len(held.asked)} rows are trained on"
        print(f"{text}, too; their reward says nothing of rows not seen", file=sys.stderr)


def read_prompts(
    table: Table,
    tokenizer: PreTrainedTokenizerBase,
    limit: int,
    room: int,
    given: str,
    where: str,
    pool: Pool | None = None,
) -> tuple[list[Asked], dict[str, Json]]:
    """Prompts in tokens, and what to say of how many were left out.

    Args:
        limit: tokens of prompt and answer together.
        room: that an answer may need.
        given: column of an answer that joins each group, or the last of a dialogue; "" none.
        pool: what asks in its own words, whose length then counts.
    """
    counts: Counter[str] = Counter()
    made: list[Asked] = []
    marks = turn_marks(tokenizer)
    for i, row in enumerate(map(last_answer, table.rows) if given else table.rows):
        if pool is not None and (why := why_unused(pool, row, f"{where} {table.place(i)}")):
            counts[why] += 1
            continue
        with of_row(f"{where} {table.place(i)}"):
            row = as_prompt(row)
            found = row["prompt"]
            shown = pool.prompt(row, 0)[0] if pool is not None else found
            ids = tuple(prompt_ids(tokenizer, cast(Prompt, shown)))
        if holds(found, marks):
            counts[COUNT] += 1
        if not ids:
            raise no_prompt(f"{where} {table.place(i)}")
        if len(ids) + room > limit:
            counts["left_out_long"] += 1
            continue
        answer: tuple[int, ...] = ()
        if given:
            whole = _given(row, given, tokenizer, f"{where} {table.place(i)}")
            if whole is None:
                counts["left_out_empty"] += 1
                continue
            answer = whole[: limit - len(ids)]
            counts["cut"] += len(whole) > len(answer)
        made.append(Asked(row, ids, answer))
    warn(counts[COUNT], len(table), tokenizer, where)
    if not made and not counts["left_out_long"]:
        raise nothing_left(table, counts, where)
    if not made:
        raise InputError(
            f"no prompt leaves room for an answer of {room} tokens in {limit}",
            where=where,
            seen=dict(counts),
            fix="Raise max_length, lower max_tokens, or shorten the prompts",
        )
    return made, {"rows": len(made), **{n: c for n, c in sorted(counts.items()) if c}}


def _given(
    row: Row, column: str, tokenizer: PreTrainedTokenizerBase, place: str
) -> tuple[int, ...] | None:
    """Tokens of a row's own answer; None where it is empty."""
    text = row.get(column)
    if not isinstance(text, str):
        raise InputError(
            f"needs the column {column!r}, or messages that end with an answer in words",
            where=place,
        )
    return tuple(completion_ids(tokenizer, text)) if text.strip() else None

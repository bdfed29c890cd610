"""What online methods ask: the prompts of rows, or an environment's tasks, checked with the model.

Template and memory are tried with a short answer to each before anything is drawn.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from truing.context import Json, current
from truing.core.answers import Asked
from truing.core.chat import Prompt, completion_ids, prompt_ids
from truing.core.collect import Pool
from truing.core.episodes import World
from truing.core.memory import Beside
from truing.core.online import Online
from truing.core.online_mix import Added
from truing.core.online_training import OnlineTraining
from truing.core.pools import why_unused
from truing.core.row_kinds import as_kind, last_answer, nothing_left, summed
from truing.core.start import Start
from truing.core.tree import group_tree
from truing.errors import InputError
from truing.tables import Table, prompt_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def _check(
    start: Start,
    prompts: Sequence[Sequence[int]],
    largest: int,
    notes: dict[str, Json],
    beside: Beside,
    added: Added | None,
) -> None:
    """Check template and memory with a short answer to each prompt, and what is learnt beside."""
    answer = completion_ids(start.loaded.tokenizer, "yes")
    trees = [group_tree(ids, [answer]) for ids in prompts]
    if added is not None:
        trees += added.trees
        largest, notes = max(largest, *(t.size for t in added.trees)), {**notes, **added.notes}
    start.check(trees, largest, notes, beside=beside)


def tasks_of(
    settings: OnlineTraining,
    start: Start,
    data: Table,
    world: World,
    beside: Beside,
    added: Added | None,
) -> list[Asked]:
    """An environment's tasks, whose prompts it makes itself; some are begun, to see that it can."""
    tokenizer, seed = start.loaded.tokenizer, current().stream("tried")
    rows = data.rows
    found = world.tried(tokenizer, [(r, seed) for r in rows], settings.new_tokens)
    longest = max(map(len, found))
    # Of replies nothing is known yet: as long as the first prompt, by way of a forecast.
    grown = settings.turns * (settings.new_tokens + longest)
    largest = longest + settings.answers * min(start.limit - longest, grown)
    _check(start, found, largest, {"rows": len(rows)}, beside, added)
    return [Asked(row, ()) for row in rows]


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
    for i, row in enumerate(map(last_answer, table.rows) if given else table.rows):
        found = prompt_of(row)
        shown = found
        if pool is not None:
            if why := why_unused(pool, row, f"{where} {table.place(i)}"):
                counts[why] += 1
                continue
            shown = pool.prompt({**row, "prompt": found}, 0)[0]
        ids = tuple(prompt_ids(tokenizer, cast(Prompt, shown)))
        if len(ids) + room > limit:
            counts["left_out_long"] += 1
            continue
        answer: tuple[int, ...] = ()
        if given:
            text = row.get(given)
            if not isinstance(text, str):
                raise InputError(
                    f"needs the column {given!r}, or messages that end with an answer in words",
                    where=f"{where} {table.place(i)}",
                )
            if not text.strip():
                counts["left_out_empty"] += 1
                continue
            whole = tuple(completion_ids(tokenizer, text))
            answer = whole[: limit - len(ids)]
            counts["cut"] += len(whole) > len(answer)
        made.append(Asked({**row, "prompt": found}, ids, answer))
    if not made and not counts["left_out_long"]:
        raise nothing_left(table, counts, where)
    if not made:
        raise InputError(
            f"no prompt leaves room for an answer of {room} tokens in {limit}",
            where=where,
            seen=dict(counts),
            fix="Raise max_tokens, lower new_tokens, or shorten the prompts",
        )
    return made, {"rows": len(made), **{n: c for n, c in sorted(counts.items()) if c}}


def prompts_of(
    spec: Online,
    given: str,
    settings: OnlineTraining,
    start: Start,
    data: Table,
    pool: Pool | None,
    beside: Beside,
    added: Added | None,
) -> list[Asked]:
    """The prompts in tokens; template and memory are checked with a short answer to each."""
    tokenizer = start.loaded.tokenizer
    rows, said = as_kind(data, spec.rows, spec.name)
    prompts, notes = read_prompts(
        rows, tokenizer, start.limit, settings.new_tokens, given, spec.name, pool
    )
    longest = max(len(p.ids) for p in prompts) + settings.answers * settings.new_tokens
    asked = [p.ids for p in prompts]
    _check(start, asked, longest, summed(notes, said), beside, added)
    return prompts

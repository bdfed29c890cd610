"""Magpie's filter: keep well-posed instructions whose answers a reward finds good, longest first.

A row stays when its tag `input_quality` is good or excellent (where no row was asked for it, all
pass), its `instruct_reward` or the given reward is above the cut, and its instruction does not end
with a colon. The rest is sorted by the length of the answer in characters, falling; the first `n`
are kept and shuffled with seed 42, as in the released 300K recipe (arXiv 2406.08464). Its
de-duplication rule is the step select/near_duplicates. Sorting by length favours long answers: the
paper's choice. Of a dialogue the first user message is the instruction, and the last answer, after
all that goes before it, is rewarded and measured.

Differences: two cuts of the paper's other mixes are not made here, of the reward less that of a
base model's answer above 0 (write the difference to `instruct_reward` for that), and of the
distance to the nearest neighbour above 0.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import cast

from truing.core.judging.scores import check_reward, total_scores
from truing.errors import InputError
from truing.kinds import prompt_of
from truing.method import method
from truing.select.near_duplicates import answer_texts, instruction
from truing.tables import Message, Row, Table

GOOD = ("good", "excellent")
SHUFFLE_SEED = 42


def was_tagged(data: Table) -> bool:
    """Whether a tagger was asked how good these instructions are; one it left unread has no tag."""
    asked = (cast(Row, row["lineage"]).get("tags") or () for row in data)
    return "input_quality" in data.columns or any("quality" in cast("list[str]", t) for t in asked)


def passes(row: Row, reward: float | None, cut: float, tagged: bool) -> bool:
    """Whether one row stays; one whose tag could not be read does not, where rows are tagged."""
    if tagged and row.get("input_quality") not in GOOD:
        return False
    return not instruction(row).rstrip().endswith(":") and (reward is None or reward > cut)


def as_answered(row: Row) -> Row:
    """A row with prompt and completion, also when it came as messages that end with an answer."""
    messages = cast("list[Message]", row.get("messages") or [])
    if "prompt" in row or not messages or messages[-1].get("role") != "assistant":
        return row
    prompt = prompt_of(row | {"messages": messages[:-1]})
    return row | {"prompt": prompt, "completion": messages[-1]["content"] or ""}


def longest(rows: Sequence[Row], n: int) -> list[int]:
    """Places of the `n` longest answers (all for 0), shuffled with the paper's seed."""
    sizes = [len(next(iter(answer_texts(row)), "")) for row in rows]
    ranked = sorted(range(len(rows)), key=lambda i: -sizes[i])
    kept = ranked[:n] if n else ranked
    random.Random(SHUFFLE_SEED).shuffle(kept)
    return kept


@method(paper="magpie", within={"n": (0, None), "cut": "(-inf, inf)"}, makes="data")
def magpie_filter(
    data: Table, *, reward: dict[str, object] | None = None, cut: float = -10.0, n: int = 300000
) -> Table:
    """Magpie's filter: keep well-posed instructions whose answers a reward finds good.

    Args:
        reward: reward or check that scores prompt and completion, {use: name, ...}, by the sum
            where it names several values; without it the column `instruct_reward` counts where
            there is one, and a row without is dropped.
        cut: a row's reward must be greater.
        n: rows to keep, those with the longest answers.
    """
    rows = list(data.rows)
    values: list[float | None] = [None] * len(rows)
    if reward is not None:
        check_reward(reward, where="select/magpie_filter setting 'reward'")
        with data.naming():
            answered = [as_answered(row) for row in rows]
            values = list(total_scores(reward, answered, where="select/magpie_filter"))
    elif "instruct_reward" in data.columns:
        for i, row in enumerate(rows):
            value = row.get("instruct_reward")
            if value is not None and not isinstance(value, (int, float)):
                raise InputError(
                    "column 'instruct_reward' must hold numbers",
                    where=data.place(i),
                    seen=value,
                )
            values[i] = float(value) if value is not None else float("-inf")
    tagged = was_tagged(data)
    kept = data.take(i for i, v in enumerate(values) if passes(rows[i], v, cut, tagged))
    found = kept.take(longest(kept.rows, n))
    return found.with_lineage(filter=f"magpie_filter > {cut:g}")

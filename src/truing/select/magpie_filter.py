"""Magpie's filter: keep well-posed instructions whose answers a reward finds good, longest first.

A row stays when its tag `input_quality` is good or excellent (rows without tags pass), its
`instruct_reward` or the given reward is above the cut, and its instruction does not end with a
colon. The rest is sorted by the length of the answer in characters, falling; the first `n` are kept
and shuffled with seed 42, as in the released 300K recipe (arXiv 2406.08464). Its de-duplication
rule is the step select/near_duplicates. Sorting by length favours long answers: the paper's choice.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from truing.core.scores import check_reward, total_scores
from truing.errors import InputError
from truing.method import method
from truing.select.near_duplicates import row_text
from truing.tables import Row, Table

GOOD = ("good", "excellent")
SHUFFLE_SEED = 42


def passes(row: Row, reward: float | None, cut: float) -> bool:
    """Whether one row stays; a tag that could not be read (None) does not."""
    if "input_quality" in row and row["input_quality"] not in GOOD:
        return False
    return not row_text(row).rstrip().endswith(":") and (reward is None or reward > cut)


def longest(rows: Sequence[Row], n: int) -> list[int]:
    """Places of the `n` longest answers (all for 0), shuffled with the paper's seed."""
    ranked = sorted(range(len(rows)), key=lambda i: -len(str(rows[i].get("completion", ""))))
    kept = ranked[:n] if n else ranked
    random.Random(SHUFFLE_SEED).shuffle(kept)
    return kept


@method(paper="magpie", within={"n": (0, None)}, makes="data")
def magpie_filter(
    data: Table, *, reward: dict[str, object] | None = None, cut: float = -10.0, n: int = 300000
) -> Table:
    """Magpie's filter: keep well-posed instructions whose answers a reward finds good.

    Args:
        reward: reward or check that scores prompt and completion, {use: name, ...}, by the sum
            where it names several values; without it the column `instruct_reward` counts where
            there is one.
        cut: a row's reward must be greater.
        n: rows to keep, those with the longest answers.
    """
    rows = list(data.rows)
    values: list[float | None] = [None] * len(rows)
    if reward is not None:
        check_reward(reward, where="select/magpie_filter setting 'reward'")
        with data.naming():
            values = list(total_scores(reward, rows, where="select/magpie_filter"))
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
    kept = data.take(i for i, v in enumerate(values) if passes(rows[i], v, cut))
    found = kept.take(longest(kept.rows, n))
    return found.with_lineage(filter=f"magpie_filter > {cut:g}")

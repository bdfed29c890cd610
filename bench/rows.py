"""Rows of the benchmarks: preference pairs of hh_rlhf as token ids, in the order of their file.

The pairs of the common row are those whose chosen answer is clearly the longer one: a preference
that few updates learn, so that the loss moves and agreement step by step means something.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from bench import runner
from bench.runner import say

SET = "hh_rlhf/helpful-base.test"
LONG_SET = "hh_rlhf/helpful-online.test"
MOST = 1024  # tokens of a prompt and one answer
LONG_PROMPT = 600  # tokens at least
LONG_ANSWER = (60, 300)  # tokens of each answer: about 150
LONGER = 1.5  # times as many tokens in the chosen answer as in the rejected one


@dataclass(frozen=True)
class Pair:
    """Token ids of a prompt and its two answers."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    @property
    def longest(self) -> int:
        """Tokens of the longer of the two rows."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


def keeps(pair: Pair, long: bool) -> bool:
    """Whether the pair belongs: with a clearly longer chosen answer, or with a long prompt."""
    if pair.longest > MOST or pair.chosen == pair.rejected:
        return False
    if not long:
        return len(pair.chosen) >= LONGER * len(pair.rejected)
    low, high = LONG_ANSWER
    answers = (len(pair.chosen), len(pair.rejected))
    return len(pair.prompt) >= LONG_PROMPT and all(low <= n <= high for n in answers)


def chosen_pairs(pairs: Iterable[Pair], count: int, long: bool) -> list[Pair]:
    """The first `count` pairs that belong; an InputError when there are fewer."""
    found: list[Pair] = []
    for pair in pairs:
        if keeps(pair, long):
            found.append(pair)
            if len(found) == count:
                return found
    from truing.errors import InputError

    raise InputError(
        "the data set has fewer pairs that belong",
        where="--pairs",
        seen=count,
        fix=f"Give {len(found)} at most",
    )


def find_data() -> None:
    """Where TRUING_DATA names no folder, take the one beside the checkout, if it is there."""
    beside = runner.ROOT.parent / "shared" / "data"
    if not os.environ.get("TRUING_DATA") and (beside / "index.json").is_file():
        say("TRUING_DATA is not set: rows are read from ../shared/data, beside the checkout")
        os.environ["TRUING_DATA"] = str(beside)


def read(model: str, count: int, long: bool = False) -> list[Pair]:
    """Pairs of the data set in the model's tokens; an InputError before the model is fetched."""
    from truing import datasets
    from truing.core.chat import completion_ids, prompt_ids
    from truing.models import Model

    find_data()
    table = datasets.read(LONG_SET if long else SET, "pair")
    tokenizer = Model.open(model).load_module().tokenizer

    def every() -> Iterator[Pair]:
        for row in table:
            yield Pair(
                prompt_ids(tokenizer, row["prompt"]),  # type: ignore[arg-type]
                completion_ids(tokenizer, str(row["chosen"])),
                completion_ids(tokenizer, str(row["rejected"])),
            )

    return chosen_pairs(every(), count, long)


def steps_of(rows: int, batch: int, seed: int) -> list[list[int]]:
    """Which rows each update of one epoch takes: what the engine does with that seed."""
    from truing.context import Context
    from truing.core.engine import Order

    order = Order(rows, batch, Context(seed=seed))
    return [order.step(s, rows) for s in range(-(-rows // batch))]

"""Last hidden states of both answers of pairs, and what reward models say of both.

The states are those that `core.passes.scoring` gives a head to score: of an answer's last token,
after the final norm, in float32, the model's edits, prefix and rewriter in force. A difference of
two scores of a linear head is the head on the difference of two states, so that whatever is asked
of a preference under such a head is asked of z = h(chosen) - h(rejected).

Shapes: N pairs, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
from numpy.typing import NDArray

from truing.context import Json, current
from truing.core.chat import Prompt, completion_ids, given_answer, prompt_ids
from truing.core.generate import rewritten
from truing.core.journaled import Vectors, kept_vectors
from truing.core.judging.rewards import score_model
from truing.core.passes.scoring import by_tree, check_fits, end_states
from truing.core.tree import group_tree
from truing.models import Loaded, Model
from truing.tables import Row, Table, content_hash, prompt_of

SIDES = ("chosen", "rejected")
CHUNK = 32  # pairs that a kill can cost
Numbers = NDArray[np.float64]
Asked = tuple[list[int], list[list[int]]]  # ids of the prompt, and of both answers


def differing(pairs: Table) -> list[int]:
    """Places of the pairs of which one answer can be preferred: both have words, not the same."""
    sides = ([str(row[name]).strip() for name in SIDES] for row in pairs)
    return [i for i, (a, b) in enumerate(sides) if a and b and a != b]


def _ids(loaded: Loaded, row: Row, name: str, where: str) -> list[int]:
    """Token ids of one answer of a pair, as training has given answers."""
    end = row.get(f"{name}_finished") is not False
    said = given_answer(loaded.tokenizer, str(row[name]), where, end=end)
    return completion_ids(loaded.tokenizer, said, end=end)


def pair_states(loaded: Loaded, pairs: Table) -> Numbers:
    """States [N, 2, D] of the chosen and the rejected answer of each pair.

    Args:
        pairs: one at least; what a stopped step had finished of them is read from its journal.
    Raises:
        InputError: an empty answer that has no end either, or a row beyond the model's context.
    """
    asked: list[Asked] = []
    prompts = rewritten(loaded.model, [cast(Prompt, prompt_of(row)) for row in pairs])
    with pairs.naming():
        for i, (row, prompt) in enumerate(zip(pairs, prompts, strict=True)):
            head = prompt_ids(loaded.tokenizer, prompt)
            tails = [_ids(loaded, row, name, f"row {i + 1}") for name in SIDES]
            check_fits(loaded, len(head) + max(map(len, tails)), i)
            asked.append((head, tails))

    def make(chunk: Sequence[Asked]) -> Vectors:
        trees = [group_tree(head, tails) for head, tails in chunk]
        made = by_tree(loaded, trees, end_states(loaded))
        return np.stack([state_KD.numpy().reshape(-1) for state_KD in made])

    flat = kept_vectors("pairs", loaded.model.key, asked, CHUNK, make)
    return flat.reshape(len(pairs), len(SIDES), -1).astype(np.float64)


def pair_margins(model: Model, pairs: Table) -> Numbers:
    """What a reward model says of each pair's chosen answer less what of the rejected one, [N]."""

    def name(_: int, chunk: Sequence[Row]) -> str:
        return content_hash([model.key, list(chunk)])

    def make(start: int, chunk: Sequence[Row]) -> Json:
        sides = [
            row | {"completion": row[side], "finished": row.get(f"{side}_finished", True)}
            for side in SIDES
            for row in chunk
        ]
        with pairs.naming([*range(start, start + len(chunk))] * len(SIDES)):
            made = score_model(model, sides)
        return [a - b for a, b in zip(made[: len(chunk)], made[len(chunk) :], strict=True)]

    found = current().chunks("margins", pairs.rows, CHUNK, name, make, "pairs (margins)")
    return np.array([v for _, values in found for v in cast("list[float]", values)])

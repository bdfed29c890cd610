"""Rows longer than a model's context, scored in overlapping pieces."""

from __future__ import annotations

from collections.abc import Sequence

from truing.core.tree import Node, example_tree
from truing.errors import InputError


def pieces(ids: Sequence[int], loss: Sequence[bool], limit: int, context: int = 0) -> list[Node]:
    """A row longer than `limit` tokens as overlapping pieces, one tree each.

    Each loss token is scored in exactly one piece, the first that holds it, where it sees at least
    `context` earlier tokens (half of `limit` when 0), or all there are. A row of at most `limit`
    tokens is one piece: its values are exact. Longer rows are scored as by a model that forgets.
    """
    context = context or limit // 2
    if not 0 < context < limit:
        raise InputError("the context kept must be shorter than a piece", seen=(context, limit))
    whole = example_tree(ids, loss)
    made: list[Node] = []
    start, scored = 0, 0
    while scored < len(ids):
        stop = min(start + limit, len(ids))
        marks = tuple(bool(m) and i >= scored for i, m in enumerate(whole.loss[start:stop], start))
        if any(marks) or (not made and stop == len(ids)):
            made.append(Node(whole.ids[start:stop], marks))
        scored, start = stop, stop - context
    return made

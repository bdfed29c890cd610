"""Prefix trees of any shape, for property tests."""

from __future__ import annotations

from hypothesis import strategies as st

from truing.core.tree import Node


def tokens(ids: int, length: int) -> st.SearchStrategy[list[tuple[int, bool]]]:
    """Runs of up to `length` tokens below `ids`, each with whether it carries loss."""
    each = st.tuples(st.integers(0, ids - 1), st.booleans())
    return st.lists(each, min_size=1, max_size=length)


def nodes(ids: int, length: int, leaves: int) -> st.SearchStrategy[Node]:
    """Trees of such runs, with about `leaves` branches."""
    leaf = tokens(ids, length).map(
        lambda made: Node(tuple(i for i, _ in made), tuple(b for _, b in made))
    )
    return st.recursive(
        leaf,
        lambda inner: st.tuples(leaf, st.lists(inner, min_size=1, max_size=3)).map(
            lambda made: Node(made[0].ids, made[0].loss, tuple(made[1]))
        ),
        max_leaves=leaves,
    )

"""Packed prefix trees: nothing lost, nothing doubled, each row what it would be alone."""

from __future__ import annotations

import pytest
import torch
from any_tree import nodes, tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from truing.core.batch.pieces import pieces
from truing.core.tree import (
    Node,
    Packed,
    example_tree,
    group_tree,
    pack,
    split,
)
from truing.errors import InputError

node = nodes(ids=100, length=6, leaves=8)


def seen_by(packed: Packed, at: int) -> list[int]:
    """Places that the token at `at` attends to, itself the last, in the row's order."""
    (own,) = [s for s in packed.segments if s.start <= at < s.stop]
    before = [i for a, b in own.before for i in range(a, b)]
    return before + list(range(own.start, at + 1))


@settings(derandomize=True, database=None, max_examples=80, deadline=None)
@given(st.lists(node, min_size=1, max_size=5), st.integers(1, 60))
def test_each_row_is_what_it_is_alone(trees: list[Node], budget: int) -> None:
    packs = pack(trees, budget)
    assert sum(map(len, packs)) == len(trees)
    left = iter(trees)
    for packed in packs:
        assert len(packed.ids_N) == sum(s.stop - s.start for s in packed.segments)
        here = [next(left) for _ in range(len(packed))]
        assert len(packed.ids_N) == sum(t.size for t in here)
        assert len(here) == 1 or len(packed.ids_N) <= budget
        assert packed.longest == max(t.longest for t in here)
        for u, tree in enumerate(here):
            branches = list(tree.rows())
            assert packed.mask_UKT.shape[1] >= len(branches)
            assert packed.mask_UKT[u, len(branches) :].sum() == 0
            for k, (ids, loss) in enumerate(branches):
                # The last token of the row sees the whole row, at the row's own positions.
                places = seen_by(packed, int(packed.ends_UK[u, k]))
                assert packed.ids_N[places].tolist() == list(ids)
                assert packed.positions_N[places].tolist() == list(range(len(ids)))
                # Its loss tokens, in order, each predicted by the token before it.
                wanted = [i for i, mark in enumerate(loss) if mark and i]
                found = packed.index_UKT[u, k][packed.mask_UKT[u, k] > 0]
                assert packed.target_M[found].tolist() == [ids[i] for i in wanted]
                assert packed.source_M[found].tolist() == [places[i - 1] for i in wanted]


@settings(derandomize=True, database=None, max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 40), max_size=20), st.integers(1, 60))
def test_split_keeps_order_and_budget(sizes: list[int], budget: int) -> None:
    runs = split(sizes, budget)
    assert [i for run in runs for i in run] == list(range(len(sizes)))
    for run in runs:
        assert len(run) == 1 or sum(sizes[i] for i in run) <= budget
    greedy, used = 0, budget + 1
    for size in sizes:
        if used + size > budget:
            greedy, used = greedy + 1, 0
        used += size
    assert len(runs) == greedy  # taking as many as fit, one after the other, is fewest


def test_split_is_even() -> None:
    assert split([10, 10, 10, 10], 30) == [[0, 1], [2, 3]]
    assert split([50, 1, 1], 10) == [[0], [1, 2]]
    assert split([50, 6, 6], 10) == [[0], [1], [2]]  # a long row makes no other run long
    assert split([], 10) == []


@settings(derandomize=True, database=None, max_examples=200, deadline=None)
@given(tokens(ids=100, length=6), st.integers(2, 9), st.data())
def test_pieces_score_each_token_once(
    row: list[tuple[int, bool]], limit: int, data: st.DataObject
) -> None:
    ids, loss = [i for i, _ in row] * 4, [b for _, b in row] * 4
    context = data.draw(st.integers(1, limit - 1))
    made = pieces(ids, loss, limit, context)
    scored: list[int] = []
    for tree in made:
        assert len(tree.ids) <= limit
        starts = [s for s in range(len(ids)) if tuple(ids[s : s + len(tree.ids)]) == tree.ids]
        marks = [i for i, mark in enumerate(tree.loss) if mark]
        scored += [len(marks)]
        assert starts and all(i >= context or 0 in starts for i in marks)
    assert sum(scored) == sum(loss)
    if len(ids) <= limit:
        assert made == [example_tree(ids, loss)]


def test_pairs_and_groups() -> None:
    tree = group_tree([1, 2], [[3], [4, 5]])
    rows = list(tree.rows())
    assert rows == [((1, 2, 3), (False, False, True)), ((1, 2, 4, 5), (False, False, True, True))]
    assert (tree.size, tree.longest) == (5, 4)
    (packed,) = pack([tree, group_tree([7], [[8], [9], [6, 6]])])
    assert packed.ids_N.tolist() == [1, 2, 3, 4, 5, 7, 8, 9, 6, 6]
    assert packed.positions_N.tolist() == [0, 1, 2, 2, 3, 0, 1, 1, 1, 2]
    assert packed.mask_UKT.tolist() == [
        [[1, 0], [1, 1], [0, 0]],
        [[1, 0], [1, 0], [1, 1]],
    ]


def test_spread_carries_gradients() -> None:
    (packed,) = pack([group_tree([1, 2], [[3], [4, 5]])])
    value_M = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    spread = packed.spread(value_M, fill=-9.0)
    assert spread.tolist() == [[[1.0, -9.0], [2.0, 3.0]]]
    (spread * torch.tensor([[1.0, 5.0], [2.0, 3.0]])).sum().backward()
    assert value_M.grad is not None and value_M.grad.tolist() == [1.0, 2.0, 3.0]


def test_what_cannot_be_packed() -> None:
    with pytest.raises(InputError, match="at least one token"):
        group_tree([], [[1]])
    with pytest.raises(InputError, match="at least one token"):
        group_tree([1], [[2], []])
    with pytest.raises(InputError, match="one loss mark for each"):
        Node((1, 2), (True,))
    with pytest.raises(InputError, match="nothing to pack"):
        pack([])
    with pytest.raises(InputError, match="row 1") as error:
        pack([group_tree([1], [[2]]), group_tree([1, 2], [[3, 4]])], 10, limit=3)
    assert "context of 3" in str(error.value)
    with pytest.raises(InputError, match="shorter than a piece"):
        pieces([1, 2, 3], [True] * 3, 2, 2)

"""Attention over trees against full attention with an explicit mask, in value and gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from truing.core.batch.layout import BLOCK, LONG, Layout
from truing.core.passes import attention
from truing.core.passes.attention import attend
from truing.core.tree import Node, Segment, pack


def segments_of(*trees: Node) -> tuple[Segment, ...]:
    return pack(list(trees), 10**6)[0].segments


def node(size: int, *children: Node) -> Node:
    return Node((1,) * size, (True,) * size, children)


def allowed(segments: tuple[Segment, ...], window: int | None = None) -> Tensor:
    """Which token sees which, [N, N], written out token by token."""
    size = segments[-1].stop
    seen = torch.zeros(size, size, dtype=torch.bool)
    for s in segments:
        for i in range(s.start, s.stop):
            row = [k for a, b in s.before for k in range(a, b)] + list(range(s.start, i + 1))
            seen[i, row if window is None else row[-window:]] = True
    return seen


def plain(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> Tensor:
    """[N, H, D] by the definition, in float64."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[0] // k.shape[0], 0) for x in (k, v))
    score = (q @ k.transpose(1, 2) * scale).masked_fill(~seen, float("-inf"))
    return (score.softmax(-1) @ v).transpose(0, 1)


def compare(
    segments: tuple[Segment, ...],
    heads: int,
    groups: int,
    dtype: torch.dtype,
    window: int | None = None,
) -> None:
    torch.manual_seed(0)
    size = segments[-1].stop
    shapes = [(heads, size, 8), (groups, size, 8), (groups, size, 8)]
    leaves = [torch.randn(s).to(dtype).requires_grad_() for s in shapes]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    up = torch.randn(size, heads, 8)
    mine = attend(*leaves, Layout(segments).within(window), scale=0.4)  # type: ignore[misc]
    (mine * up).sum().backward()
    want = plain(*wide, allowed(segments, window), 0.4)  # type: ignore[misc]
    (want * up).sum().backward()
    loose = 1e-5 if dtype == torch.float32 else 1e-9
    for a, b in [(mine, want), *((x.grad, y.grad) for x, y in zip(leaves, wide))]:
        assert float((a - b).detach().abs().max()) < loose * max(1.0, float(b.detach().abs().max()))


TREES = {
    "one row": [node(9)],
    "one token": [node(1)],
    "a pair": [node(5, node(3), node(4))],
    "two trees": [node(2, node(3), node(1)), node(4, node(2))],
    "turns": [node(3, node(2, node(4), node(1)), node(5))],
    "longer than a block": [node(BLOCK + 30, node(BLOCK + 1), node(3, node(40)))],
}


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("name", list(TREES))
def test_float32_by_our_own_gradients(name: str, heads: tuple[int, int]) -> None:
    compare(segments_of(*TREES[name]), *heads, torch.float32)


@pytest.mark.parametrize("name", list(TREES))
def test_other_dtypes_by_pytorch(name: str) -> None:
    compare(segments_of(*TREES[name]), 4, 2, torch.float64)


@pytest.mark.parametrize("window", [1, 2, 4, 7, BLOCK + 3])
@pytest.mark.parametrize("name", list(TREES))
def test_a_window_reaches_back_along_the_row(name: str, window: int) -> None:
    compare(segments_of(*TREES[name]), 4, 2, torch.float32, window)
    if window == 4:
        compare(segments_of(*TREES[name]), 4, 2, torch.float64, window)


def test_a_window_of_several_blocks() -> None:
    compare(segments_of(node(900, node(700), node(30))), 1, 1, torch.float32, 600)


def test_without_longer_rows_a_window_changes_nothing() -> None:
    layout = Layout(segments_of(*TREES["turns"]))
    assert layout.within(layout.longest) is layout.within(None) is layout
    assert layout.within(5) is layout.within(5) is not layout


nodes = st.recursive(
    st.integers(1, 5).map(node),
    lambda inner: st.tuples(st.integers(1, 5), st.lists(inner, min_size=1, max_size=3)).map(
        lambda made: node(made[0], *made[1])
    ),
    max_leaves=6,
)


@settings(derandomize=True, database=None, max_examples=60, deadline=None)
@given(st.lists(nodes, min_size=1, max_size=3), st.none() | st.integers(1, 9))
def test_any_tree(trees: list[Node], window: int | None) -> None:
    compare(segments_of(*trees), 4, 2, torch.float32, window)


def test_nodes_are_read_in_pieces_with_the_heads_of_a_key_together() -> None:
    # The kernel computes a causal node of 400 tokens as a square, and hides half of it.
    before = ((0, 400),)
    segments = (Segment(0, 400, ()), Segment(400, 550, before), Segment(550, 570, before))
    compare(segments, 6, 2, torch.float32)
    cut = Layout(segments).cut(torch.zeros(1), 3)
    assert [[p.stop - p.start for p in pieces] for pieces in cut] == [
        [128, 128, 128, 16], [128, 22], [20]
    ]  # fmt: skip
    pairs = 0
    for piece in cut[0]:
        own = piece.stop - piece.start
        assert piece.last == piece.stop
        assert (None if piece.mask is None else piece.mask.shape) == (
            None if own == piece.last else (3 * own, piece.last)
        )
        pairs += own * piece.last
    assert pairs < 0.7 * 400**2
    assert [p.last for p in cut[1]] == [528, 550] and cut[2][0].last == 420


def test_keys_that_lie_apart_are_joined_once(monkeypatch: pytest.MonkeyPatch) -> None:
    segments = segments_of(node(40, node(300, node(9), node(30)), node(12)))
    assert len(Layout(segments).segments) == 3
    made: list[int] = []
    true = torch.cat

    def count(parts: list[Tensor], dim: int) -> Tensor:
        made.append(len(parts))
        return true(parts, dim)

    q, k, v = torch.randn(4, 391, 8), torch.randn(2, 391, 8), torch.randn(2, 391, 8)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    layout = Layout(segments)
    monkeypatch.setattr(torch, "cat", count)
    out = attend(*leaves, layout)
    assert made == [2, 2, 2, 2]  # keys and values of the two segments with a gap
    torch.autograd.grad(out.sum(), leaves)
    assert len(made) == 8


def test_key_heads_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    segments = segments_of(node(150, node(20), node(9)))
    monkeypatch.setattr(attention, "MOST", 2 * BLOCK * 2 * 150)
    block = Layout(segments).blocks()[0][0]
    assert len(attention._turns(6, block, 2)) == 3 and len(attention._turns(6, block, 1)) == 2
    compare(segments, 12, 6, torch.float32)
    monkeypatch.setattr(attention, "MOST", 1)
    compare(segments, 12, 6, torch.float32)


def test_masks_of_long_rows_stay_small() -> None:
    segments = (Segment(0, LONG + 76, ()), Segment(LONG + 76, LONG + 276, ((0, LONG + 76),)))
    compare(segments, 4, 2, torch.float32)
    (whole,), (first, second) = Layout(segments).cut(torch.zeros(1), 2)
    assert (whole.start, whole.stop) == (0, LONG + 76) and whole.mask is None  # as small as can be
    assert [p.mask.shape[0] for p in (first, second) if p.mask is not None] == [128, 72]


def test_large_scores_stay_finite() -> None:
    segments = segments_of(node(6, node(3)))
    q, k, v = (torch.randn(2, 9, 8).mul(60).requires_grad_() for _ in range(3))
    attend(q, k, v, Layout(segments)).sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (q, k, v))


def test_values_of_another_width_than_keys() -> None:
    segments = segments_of(node(6, node(3), node(2)))
    q, k, v = torch.randn(4, 11, 8), torch.randn(2, 11, 8), torch.randn(2, 11, 6)
    mine = attend(q, k, v, Layout(segments), scale=0.3)
    assert torch.allclose(mine.double(), plain(q, k, v, allowed(segments), 0.3), atol=1e-5)

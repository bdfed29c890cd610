"""Packed prefix trees: a prompt is stored and computed once, the answers branch from it.

A tree is a `Node` of token ids with children. The tokens of a leaf's row are those on the path from
the root; a branch is one leaf, in depth-first order: chosen = 0, rejected = 1 for a pair. Trees are
laid end to end without padding (`pack`), parents before children, so that every layer of a model
sees one flat list of N tokens and only attention needs to know the tree: a token sees its ancestors
and the earlier tokens of its own node. Positions continue from the parent's last, so each row has
the positions it would have alone. (Shared prompts: arXiv 2410.20305.)

With `share`, whatever the rows of a micro-batch begin with alike is stored and computed once too:
dialogues that part after some turn, answers that begin with the same words. A token of several rows
has one place in the flat list and is counted in each of them.

Shapes: N tokens of a micro-batch, M loss tokens in it, U trees, K branches of a tree, T loss tokens
of a branch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from truing.errors import InputError

BUDGET = 1024  # tokens of a micro-batch; what a two-core machine computes at its best rate
BUDGET_GPU = 4096  # without gradients; with fewer a GPU waits for what it is told to do
COMMON = 8  # tokens from which on a common beginning is worth a segment of its own
ROOT = 4  # share of a root that is worth making it a node with ancestors, where a GPU is slower


@dataclass(frozen=True)
class Node:
    """A run of tokens and what may follow it.

    Args:
        ids: token ids, at least one.
        loss: for each token, whether it carries loss (is predicted, scored, trained on).
        children: continuations, each from its own first token.
    """

    ids: tuple[int, ...]
    loss: tuple[bool, ...]
    children: tuple[Node, ...] = ()

    def __post_init__(self) -> None:
        if not self.ids or len(self.ids) != len(self.loss):
            raise InputError(
                "a node needs at least one token and one loss mark for each",
                seen=(len(self.ids), len(self.loss)),
            )

    @property
    def size(self) -> int:
        """Number of tokens of the whole tree, each counted once."""
        return len(self.ids) + sum(c.size for c in self.children)

    @property
    def longest(self) -> int:
        """Number of tokens of the longest row."""
        return len(self.ids) + max((c.longest for c in self.children), default=0)

    def rows(self) -> Iterator[tuple[tuple[int, ...], tuple[bool, ...]]]:
        """(ids, loss) of each branch, from the root to the leaf, in depth-first order."""
        if not self.children:
            yield self.ids, self.loss
        for child in self.children:
            for ids, loss in child.rows():
                yield self.ids + ids, self.loss + loss


def alike(rows: Sequence[Sequence[object]], keep: int = 0) -> int:
    """How many items all rows begin with alike; each keeps `keep` of its own."""
    most = max(min(map(len, rows)) - keep, 0)
    return next((i for i in range(most) if any(row[i] != rows[0][i] for row in rows)), most)


def group_tree(
    prompt: Sequence[int],
    completions: Sequence[Sequence[int]],
    loss: Sequence[Sequence[bool]] = (),
) -> Node:
    """A prompt without loss and its completions.

    Args:
        loss: which tokens of each completion carry loss; () for all.
    """
    if not prompt or not completions or not all(completions):
        raise InputError(
            "a prompt and its completions need at least one token each",
            seen=(len(prompt), [len(c) for c in completions]),
        )
    marks = loss or [(True,) * len(c) for c in completions]
    leaves = tuple(example_tree(c, m) for c, m in zip(completions, marks, strict=True))
    return Node(tuple(prompt), (False,) * len(prompt), leaves)


def example_tree(ids: Sequence[int], loss: Sequence[bool]) -> Node:
    """One row with its loss marks, such as a dialogue of several turns (`chat.example_ids`)."""
    return Node(tuple(ids), tuple(bool(b) for b in loss))


def fork(rows: Sequence[tuple[Sequence[int], Sequence[bool]]]) -> Node:
    """Rows (ids, loss) as the branches of one tree, what all of them begin with as its root.

    Dialogues that part after some turn, for one: turns that they share carry loss in each of them.
    Each row keeps a token of its own. Raises InputError unless all begin with the same token.
    """
    both = [list(zip(ids, loss, strict=True)) for ids, loss in rows]
    same = alike(both, keep=1)
    if not same:
        raise InputError("rows of one tree begin alike", seen=[list(ids[:3]) for ids, _ in rows])
    leaves = tuple(example_tree(ids[same:], loss[same:]) for ids, loss in rows)
    ids, loss = rows[0]
    return replace(example_tree(ids[:same], loss[:same]), children=leaves)


@dataclass(frozen=True)
class Segment:
    """Where a node lies in the flat list, and what its tokens see besides itself.

    A node's first child lies right behind it and sees all that it sees: they are one segment, which
    is quicker to attend in. `before` holds (start, stop) of the ancestors, root first, neighbours
    joined.
    """

    start: int
    stop: int
    before: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Packed:
    """Trees laid end to end: one micro-batch.

    Args:
        ids_N: token ids.
        positions_N: position of each token in its row.
        segments: the nodes, in the order of the flat list, each with its first child.
        source_M: flat index of the token that predicts each loss token.
        place_M: flat index of each loss token itself.
        target_M: id of each loss token.
        index_UKT: which of the M loss tokens; M itself at padding.
        mask_UKT: 1.0 at loss tokens, 0.0 at padding and at branches that do not exist.
        ends_UK: flat index of each branch's last token, 0 where the branch does not exist.
        longest: tokens of the longest row.
        largest: of the ids.
    """

    ids_N: Tensor
    positions_N: Tensor
    segments: tuple[Segment, ...]
    source_M: Tensor
    place_M: Tensor
    target_M: Tensor
    index_UKT: Tensor
    mask_UKT: Tensor
    ends_UK: Tensor
    longest: int
    largest: int

    def __len__(self) -> int:
        """Number of trees."""
        return self.mask_UKT.shape[0]

    def to(self, device: torch.device | str) -> Packed:
        """The same micro-batch with its tensors on `device`."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors = {n: v.to(device) for n, v in moved.items() if isinstance(v, Tensor)}
        return replace(self, **tensors)

    def spread(self, values_M: Tensor, fill: float = 0.0) -> Tensor:
        """Values of the M loss tokens as [U, K, T], `fill` at padding; differentiable."""
        return torch.cat([values_M, values_M.new_full((1,), fill)])[self.index_UKT]

    def gather(self, value_UKT: Tensor) -> Tensor:
        """The inverse of `spread`: values of the M loss tokens, [M, ...]."""
        there_UKT = self.mask_UKT > 0
        made = value_UKT.new_empty((len(self.target_M), *value_UKT.shape[3:]))
        made[self.index_UKT[there_UKT]] = value_UKT[there_UKT]
        return made


class _Packer:
    """Collects trees into the lists that a `Packed` is made of.

    Args:
        share: lay tokens with one and the same past only once.
        root: share of a root that must be there already; 0 for any.
    """

    def __init__(self, share: bool = False, root: int = 0) -> None:
        self.share, self.root = share, root
        self.after: dict[tuple[int, int], int] = {}  # (place of the token before, id) -> place
        self.numbers: dict[int, int] = {}  # place -> number among the loss tokens
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.segments: list[Segment] = []
        self.source: list[int] = []
        self.place: list[int] = []
        self.target: list[int] = []
        self.rows: list[list[list[int]]] = []  # tree, branch -> numbers of its loss tokens
        self.ends: list[list[int]] = []
        self.longest = 0

    def add(self, tree: Node) -> None:
        self.rows.append([])
        self.ends.append([])
        self._node(tree, (), 0, [])
        self.longest = max(self.longest, tree.longest)

    def _node(
        self, node: Node, before: tuple[tuple[int, int], ...], depth: int, seen: list[int]
    ) -> None:
        last = before[-1][1] - 1 if before else -1  # place of the token before; -1 for none
        known = self._known(node, last) if self.share else []
        fresh = node.ids[len(known) :]
        start = len(self.ids)
        places = [*known, *range(start, start + len(fresh))]
        for place in known:
            before = _joined(before, place, place + 1)
        if fresh:
            self.ids += fresh
            self.positions += range(depth + len(known), depth + len(node.ids))
            self._lay(start, start + len(fresh), before)
            before = _joined(before, start, start + len(fresh))
        seen = list(seen)
        for place, token, wanted in zip(places, node.ids, node.loss):
            # The first token of a row is predicted by nothing and carries no loss.
            if wanted and last >= 0:
                seen.append(self._number(place, last, token))
            if self.share:
                self.after[last, token] = place  # the latest tree's path is always whole
            last = place
        if not node.children:
            self.rows[-1].append(seen)
            self.ends[-1].append(last)
        for child in node.children:
            self._node(child, before, depth + len(node.ids), seen)

    def _lay(self, start: int, stop: int, before: tuple[tuple[int, int], ...]) -> None:
        """A segment more; a first child lengthens its parent's, as causal as before."""
        if self.segments:
            last = self.segments[-1]
            if last.stop == start and _joined(last.before, last.start, last.stop) == before:
                self.segments[-1] = Segment(last.start, stop, last.before)
                return
        self.segments.append(Segment(start, stop, before))

    def _known(self, node: Node, last: int) -> list[int]:
        """Places of the node's first tokens that lie there already; none if not worth it."""
        found: list[int] = []
        at = last
        for token in node.ids:
            place = self.after.get((at, token))
            if place is None:
                break
            found.append(place)
            at = place
        return found if _worth(len(found), len(node.ids), self.root if last < 0 else 0) else []

    def _number(self, place: int, source: int, token: int) -> int:
        """Number of the loss token at `place`; given now where it has none."""
        if place not in self.numbers:
            self.numbers[place] = len(self.source)
            self.source.append(source)
            self.place.append(place)
            self.target.append(token)
        return self.numbers[place]

    def packed(self) -> Packed:
        width = max(map(len, self.rows))
        length = max(len(r) for tree in self.rows for r in tree)
        none = len(self.source)
        index = torch.full((len(self.rows), width, length), none)
        ends = torch.zeros(len(self.rows), width, dtype=torch.long)
        for u, tree in enumerate(self.rows):
            ends[u, : len(tree)] = torch.tensor(self.ends[u])
            for k, row in enumerate(tree):
                index[u, k, : len(row)] = torch.tensor(row, dtype=torch.long)
        return Packed(
            torch.tensor(self.ids),
            torch.tensor(self.positions),
            tuple(self.segments),
            torch.tensor(self.source, dtype=torch.long),
            torch.tensor(self.place, dtype=torch.long),
            torch.tensor(self.target, dtype=torch.long),
            index,
            (index < none).float(),
            ends,
            self.longest,
            max(self.ids, default=0),
        )


def _worth(common: int, size: int, root: int) -> bool:
    """Whether a node of `size` tokens is better laid behind the `common` ones that are there."""
    return common >= max(COMMON, size // root if root else 0)


def _joined(
    ranges: tuple[tuple[int, int], ...], start: int, stop: int
) -> tuple[tuple[int, int], ...]:
    """Ranges with one more behind them, joined to the last where it follows that."""
    if ranges and ranges[-1][1] == start:
        return (*ranges[:-1], (ranges[-1][0], stop))
    return (*ranges, (start, stop))


def _common(one: Node, two: Node, root: int) -> int:
    """Tokens that `two` does not need of its own behind `one`: its root's, where that is worth it.

    What packing finds besides (branches that begin alike, earlier trees) comes on top.
    """
    same = alike([one.ids, two.ids])
    return same if _worth(same, len(two.ids), root) else 0


def split(sizes: Iterable[int], budget: int, common: Sequence[int] = ()) -> list[list[int]]:
    """Numbers 0, 1, ... in order, cut into runs whose sizes sum to at most `budget`.

    An item larger than the budget has a run of its own. The cuts are chosen so that as few runs as
    possible are made and the largest is as small as can be: even micro-batches cost least memory.
    Of an item's size `common` need not be counted where it is in one run with the item before it.
    """
    sizes = list(sizes)
    common = common or [0] * len(sizes)
    low, high = max((s for s in sizes if s <= budget), default=0), budget
    fewest = len(_runs(sizes, high, common))
    while low < high:
        middle = (low + high) // 2
        if len(_runs(sizes, middle, common)) <= fewest:
            high = middle
        else:
            low = middle + 1
    return _runs(sizes, high, common)


def _runs(sizes: Sequence[int], budget: int, common: Sequence[int]) -> list[list[int]]:
    runs: list[list[int]] = []
    used = budget + 1
    for i, (size, less) in enumerate(zip(sizes, common, strict=True)):
        size -= less
        if used + size > budget:
            runs.append([])
            used, size = 0, size + less
        runs[-1].append(i)
        used += size
    return runs


def budget_for(device: str) -> int:
    """Tokens that are computed at once on a device where there are no gradients."""
    return BUDGET if device == "cpu" else BUDGET_GPU


def pack(
    trees: Sequence[Node],
    budget: int = BUDGET,
    limit: int | None = None,
    *,
    share: bool = False,
    device: str | torch.device = "cpu",
) -> list[Packed]:
    """Lay trees end to end, in order, into micro-batches of at most `budget` tokens.

    With `share` rows of a micro-batch that begin alike have these tokens in common, whatever tree
    they are from, where that is worth it on `device`; not for those who treat each row's tokens in
    a way of its own (noise, heads, states kept by tree).

    A tree is never cut: one that is larger than the budget is a micro-batch of its own, and its
    values are as exact as all others. A row of more than `limit` tokens (the model's context) is
    an InputError: cut it yourself, or score it by `core.batch.pieces`.
    """
    if not trees:
        raise InputError("there is nothing to pack", seen=0)
    for i, tree in enumerate(trees):
        if limit is not None and tree.longest > limit:
            raise InputError(
                f"a row of {tree.longest} tokens does not fit into a context of {limit}",
                where=f"row {i}",
                fix="Shorten or leave out such rows, or score them in pieces",
            )
    made: list[Packed] = []
    root = 0 if str(device) == "cpu" else ROOT
    less = [0, *(_common(a, b, root) for a, b in itertools.pairwise(trees))] if share else []
    for run in split([t.size for t in trees], budget, less):
        packer = _Packer(share, root)
        for i in run:
            packer.add(trees[i])
        made.append(packer.packed())
    return made

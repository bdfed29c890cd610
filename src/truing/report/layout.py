"""Where the steps of a pipeline go on the page: layers from top to bottom, few crossings.

Layered drawing in the manner of Sugiyama: a step's layer is its longest path from a source, pulled
down where that shortens edges; an edge over several layers passes through a bend in each; order
within a layer by the mean position of neighbours, keeping the best order seen; at last each node is
moved to the middle of its neighbours as far as the order and the gaps allow (least squares).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

WIDTH, NARROW, HEIGHT = 204, 150, 58  # of a step; narrow ones where many stand side by side
GAP_X, GAP_Y, BEND = 22, 40, 12  # between steps; BEND is the room of an edge that passes by
SWEEPS = 12

Edge = tuple[str, str]
Point = tuple[float, float]


@dataclass(frozen=True)
class Layout:
    """Centres of nodes, the points that each edge passes, and the size of it all in pixels."""

    nodes: Mapping[str, Point]
    edges: Mapping[Edge, Sequence[Point]]
    width: float
    height: float
    box: float = WIDTH


def layers(names: Sequence[str], edges: Sequence[Edge]) -> dict[str, int]:
    """Layer of each step; `names` in topological order."""
    place = {name: i for i, name in enumerate(names)}
    forward = [e for e in edges if place[e[0]] < place[e[1]]]
    depth = dict.fromkeys(names, 0)
    for name in names:
        for a, b in forward:
            if a == name:
                depth[b] = max(depth[b], depth[a] + 1)
    for name in reversed(names):
        after = [depth[b] for a, b in forward if a == name]
        before = [a for a, b in forward if b == name]
        if after and len(after) > len(before):
            depth[name] = min(after) - 1
    return depth


class _Drawing:
    """Nodes of width `box` and bends by layer; a bend is (edge, layer), a node its name."""

    def __init__(self, names: Sequence[str], edges: Sequence[Edge], box: float) -> None:
        self.box = box
        depth = layers(names, edges)
        self.rows: list[list[object]] = [[] for _ in range(max(depth.values(), default=0) + 1)]
        self.up: dict[object, list[object]] = {}
        self.down: dict[object, list[object]] = {}
        self.chains: dict[Edge, list[object]] = {}
        for name in names:
            self.rows[depth[name]].append(name)
        for a, b in edges:
            if depth[a] >= depth[b]:
                continue
            bends: list[object] = [((a, b), i) for i in range(depth[a] + 1, depth[b])]
            for bend, i in zip(bends, range(depth[a] + 1, depth[b]), strict=True):
                self.rows[i].append(bend)
            chain: list[object] = [a, *bends, b]
            self.chains[(a, b)] = chain
            for upper, lower in pairwise(chain):
                self.down.setdefault(upper, []).append(lower)
                self.up.setdefault(lower, []).append(upper)

    def crossings(self) -> int:
        """Pairs of edges that cross between neighbouring layers."""
        found = 0
        for upper, lower in pairwise(self.rows):
            place = {node: i for i, node in enumerate(lower)}
            ends = [sorted(place[n] for n in self.down.get(node, [])) for node in upper]
            for i, mine in enumerate(ends):
                for theirs in ends[i + 1 :]:
                    found += sum(m > t for m in mine for t in theirs)
        return found

    def sweep(self, down: bool) -> None:
        """Order every layer by the mean place of its neighbours in the layer before it."""
        order = range(1, len(self.rows)) if down else range(len(self.rows) - 2, -1, -1)
        near = self.up if down else self.down
        for i in order:
            place = {node: j for j, node in enumerate(self.rows[i - 1 if down else i + 1])}
            now = {node: j for j, node in enumerate(self.rows[i])}

            def middle(
                node: object, place: dict[object, int] = place, now: dict[object, int] = now
            ) -> float:
                near_it = [place[n] for n in near.get(node, [])]
                return sum(near_it) / len(near_it) if near_it else float(now[node])

            self.rows[i].sort(key=middle)

    def untangle(self) -> None:
        """Keep the order with the fewest crossings over some sweeps."""
        best, fewest = [list(r) for r in self.rows], self.crossings()
        for i in range(SWEEPS):
            self.sweep(down=i % 2 == 0)
            crossed = self.crossings()
            if crossed < fewest:
                best, fewest = [list(r) for r in self.rows], crossed
        self.rows = best

    def place(self) -> dict[object, float]:
        """x of the centre of every node and bend."""
        x = {node: 0.0 for row in self.rows for node in row}
        for row in self.rows:
            gaps = _gaps(row, self.box)
            for node, offset in zip(row, gaps, strict=True):
                x[node] = offset - gaps[-1] / 2
        for i in range(5 * SWEEPS):
            rows = self.rows if i % 2 == 0 else list(reversed(self.rows))
            for row in rows:
                wanted: list[float] = []
                weights: list[float] = []
                for node in row:
                    near = [*self.up.get(node, []), *self.down.get(node, [])]
                    pulls = [_pull(node, n) for n in near] or [1.0]
                    places = [x[n] for n in near] or [x[node]]
                    weights.append(sum(pulls))
                    total = sum(p * w for p, w in zip(places, pulls, strict=True))
                    wanted.append(total / weights[-1])
                for node, found in zip(
                    row, spaced(wanted, weights, _gaps(row, self.box)), strict=True
                ):
                    x[node] = found
        return x


def _pull(a: object, b: object) -> float:
    """How much an edge wants to be upright: most where it only passes by."""
    bends = (not isinstance(a, str)) + (not isinstance(b, str))
    return (1.0, 3.0, 12.0)[bends]


def _gaps(row: Sequence[object], box: float) -> list[float]:
    """Least distance of each node's centre from the first one's."""
    sizes = [box + GAP_X if isinstance(node, str) else BEND for node in row]
    offsets = [0.0]
    for left, right in pairwise(sizes):
        offsets.append(offsets[-1] + (left + right) / 2)
    return offsets[: len(row)]


def spaced(
    wanted: Sequence[float], weights: Sequence[float], offsets: Sequence[float]
) -> list[float]:
    """Positions nearest to `wanted` (weighted squares) at least as far apart as the offsets are.

    Without the offsets the positions must rise: isotonic regression by pooling neighbours.
    """
    pools: list[tuple[float, float, int]] = []  # mean, weight, members
    for want, weight, offset in zip(wanted, weights, offsets, strict=True):
        mean, total, members = want - offset, weight, 1
        while pools and pools[-1][0] > mean:
            before, heavy, more = pools.pop()
            mean = (before * heavy + mean * total) / (heavy + total)
            total, members = total + heavy, members + more
        pools.append((mean, total, members))
    flat = [mean for mean, _, members in pools for _ in range(members)]
    return [f + o for f, o in zip(flat, offsets, strict=True)]


def lay_out(names: Sequence[str], edges: Sequence[Edge], box: float = WIDTH) -> Layout:
    """Place steps of width `box` and edges; `names` in topological order, edges among them."""
    if not names:
        return Layout({}, {}, 0, 0, box)
    drawing = _Drawing(names, list(dict.fromkeys(edges)), box)
    drawing.untangle()
    x = drawing.place()
    low = min(x[n] for n in x) - box / 2
    high = max(x[n] for n in x) + box / 2
    y = {n: i * (HEIGHT + GAP_Y) + HEIGHT / 2 for i, row in enumerate(drawing.rows) for n in row}
    at = {n: (round(x[n] - low, 1), round(y[n], 1)) for n in x}
    return Layout(
        {name: at[name] for name in names},
        {edge: [at[n] for n in chain] for edge, chain in drawing.chains.items()},
        round(high - low, 1),
        len(drawing.rows) * (HEIGHT + GAP_Y) - GAP_Y,
        box,
    )

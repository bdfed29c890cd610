"""Remove near-duplicates: of each group of texts with nearly one meaning, the first is kept.

With e_i the unit sentence vector of row i and d_ij = ||e_i - e_j||^2 = 2 - 2 cos(e_i, e_j), the
similar set of i is S_i = {j != i: d_ij < threshold}; i is kept when S_i is empty or i < min S_i.
That is Magpie's rule (arXiv 2406.08464, threshold 0.05 with its 768-d encoder). The released code
looks at the 500 nearest neighbours; here all are compared, in blocks, so the rule is exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from truing.method import method
from truing.tables import Row, Table, user_text

BLOCK = 1024  # rows compared at a time: bounds the memory of the distance matrix


@dataclass(frozen=True)
class Neighbours:
    """Per row: squared distance to the nearest other, size of the similar set, its least index.

    `min_similar` is None where the similar set is empty, otherwise the least index among the row
    itself and its similar set.
    """

    min_distance: list[float]
    repeat_count: list[int]
    min_similar: list[int | None]

    def keep(self) -> list[int]:
        """Indices of the rows that the rule keeps."""
        return [i for i, m in enumerate(self.min_similar) if m is None or m == i]


def neighbours(vectors_ND: NDArray[np.float32], threshold: float) -> Neighbours:
    """Nearest neighbours by squared L2 distance of unit vectors [N, D]."""
    distance: list[float] = []
    count: list[int] = []
    least: list[int | None] = []
    for start in range(0, len(vectors_ND), BLOCK):
        block_BD = vectors_ND[start : start + BLOCK]
        d_BN = np.maximum(2.0 - 2.0 * (block_BD @ vectors_ND.T), 0.0)
        rows = np.arange(len(block_BD))
        d_BN[rows, rows + start] = np.inf
        similar_BN = d_BN < threshold
        distance += [float(d) for d in d_BN.min(axis=1)]
        count += [int(c) for c in similar_BN.sum(axis=1)]
        for i in rows:
            near = np.flatnonzero(similar_BN[i])
            least.append(min(int(near[0]), start + int(i)) if len(near) else None)
    return Neighbours(distance, count, least)


def row_text(row: Row) -> str:
    """The text of a row that is compared: its prompt, its last user message or its text."""
    if "prompt" in row or "messages" in row:
        return user_text(row.get("prompt", row.get("messages")))
    return str(row.get("text", ""))


def text_vectors(texts: list[str], key: str) -> NDArray[np.float32]:
    """Unit vectors of texts: by meaning, or one-hot by exact text for `exact`."""
    if key == "exact":
        place = {t: i for i, t in enumerate(dict.fromkeys(t.strip().lower() for t in texts))}
        return np.eye(len(place), dtype=np.float32)[[place[t.strip().lower()] for t in texts]]
    from truing.core.embed import embed

    return embed(texts)


@method(paper="magpie")
def near_duplicates(data: Table, *, threshold: float = 0.05, exact: bool = False) -> Table:
    """Remove near-duplicates: of each group of texts with nearly one meaning, the first is kept.

    Args:
        threshold: squared distance of two unit sentence vectors below which they are duplicates.
        exact: compare the texts themselves, without case, instead of their meaning.
    """
    if len(data) < 2:
        return data
    vectors = text_vectors([row_text(r) for r in data], "exact" if exact else "")
    found = neighbours(vectors, threshold)
    rows = [data.rows[i] for i in found.keep()]
    return Table(data.kind, rows, where=data.source).with_lineage(
        filter=f"near_duplicates {threshold:g}"
    )

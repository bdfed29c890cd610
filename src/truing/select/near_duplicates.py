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

from truing.core.embed import embed
from truing.core.embed import near_duplicates as compare
from truing.method import method
from truing.tables import Row, Table, user_text


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
    similar, least_N = compare(vectors_ND, threshold)
    first = [min(near[0], i) if near else None for i, near in enumerate(similar)]
    return Neighbours([float(d) for d in least_N], [len(near) for near in similar], first)


def row_text(row: Row) -> str:
    """The text of a row that is compared: its prompt, its last user message or its text."""
    if "prompt" in row or "messages" in row:
        return user_text(row.get("prompt", row.get("messages")))
    return str(row.get("text", ""))


def row_name(row: Row) -> str:
    """What tells rows of different contents apart: the text, or the id of a row without one."""
    return row_text(row) or str(row["id"])


def known(text: str) -> str:
    """A text as it is compared with others word for word."""
    return text.strip().lower()


@method(paper="magpie")
def near_duplicates(data: Table, *, threshold: float = 0.05, exact: bool = False) -> Table:
    """Remove near-duplicates: of each group of texts with nearly one meaning, the first is kept.

    Args:
        threshold: squared distance of two unit sentence vectors below which they are duplicates.
        exact: compare the texts themselves, without case, instead of their meaning.
    """
    if len(data) < 2:
        return data
    texts = [row_text(r) for r in data]
    if exact:
        first: dict[str, int] = {}
        for i, row in enumerate(data):
            first.setdefault(known(row_name(row)), i)
        kept = list(first.values())
    elif not any(texts):  # images and the like have no meaning that is compared here
        return data
    else:
        kept = neighbours(embed(texts), threshold).keep()
    return data.take(kept).with_lineage(filter=f"near_duplicates {threshold:g}")

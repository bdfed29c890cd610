"""How many rows of each source the page holds: together, what a browser opens without waiting."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

from truing.report.samples import Source

ROOM = 8_000_000  # characters of all rows


def fitting(sources: Sequence[Source], room: float = ROOM) -> list[Source]:
    """The first rows of every source, one at least; what small ones leave is for the others."""
    ends = [list(accumulate(len(str(row)) for row in source.rows)) for source in sources]
    many = [0] * len(sources)
    for done, i in enumerate(sorted(range(len(sources)), key=lambda i: ends[i][-1:])):
        many[i] = max(1, bisect_right(ends[i], room / (len(sources) - done)))
        room -= ends[i][: many[i]][-1] if ends[i] else 0
    return [replace(s, rows=s.rows[:n]) for s, n in zip(sources, many, strict=True)]

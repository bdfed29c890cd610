"""Rows that a module reads side by side, filled up to the longest: neighbours in length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def batches(
    lengths: Sequence[int], room: int, *, shortest_first: bool = False
) -> Iterator[list[int]]:
    """Places of rows to be read together, each row once.

    Args:
        lengths: of the rows, in tokens; rows of one length stay in their order.
        room: tokens of a batch at most, padding included; a longer row is read alone.
        shortest_first: begin with the short rows. Longest first, what takes most memory comes
            first. The order decides which rows meet, and so the last bits of what is computed.
    """
    batch: list[int] = []
    longest = 0
    for i in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=not shortest_first):
        longest = max(longest, lengths[i])
        if batch and longest * (len(batch) + 1) > room:
            yield batch
            batch, longest = [], lengths[i]
        batch.append(i)
    if batch:
        yield batch

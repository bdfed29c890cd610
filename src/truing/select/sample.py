"""A random sample of rows, or all the rows that are not in it.

Rows with one prompt go together, so that the sample and the rest never share a prompt: capitals and
the space around it are no difference, other words are (select/split parts near-duplicates, too).
The order in which prompts are drawn depends on their text and the step's seed alone, not on their
place in the table; rows without texts, such as images, go by their ids. The baseline that every
selection method is to be compared with; no paper.
"""

from __future__ import annotations

from collections import Counter
from typing import Literal

from truing.context import current
from truing.errors import InputError
from truing.method import method
from truing.select.near_duplicates import known, row_name
from truing.tables import Row, Table, content_hash


def drawn(rows: list[Row], n: int, seed: int) -> list[bool]:
    """For each row, whether it is one of the `n` drawn (fewer where the last prompt is larger)."""
    names = [row_name(row) for row in rows]
    prompts: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        prompts.setdefault(known(name), []).append(i)

    def rank(places: list[int]) -> str:
        return content_hash([seed, min(names[i] for i in places)])

    chosen = [False] * len(rows)
    left = n
    for places in sorted(prompts.values(), key=rank):
        if len(places) <= left:
            left -= len(places)
            for i in places:
                chosen[i] = True
    return chosen


@method(within={"n": (1, None)}, makes="data")
def sample(data: Table, *, n: int, part: Literal["sample", "rest"] = "sample") -> Table:
    """A random sample of rows, or all the rows that are not in it.

    Args:
        n: rows to draw.
        part: the sample, or what it leaves; two steps with the same seed and n fit together.
    """
    if not 0 < n <= len(data):
        raise InputError(
            "cannot draw so many rows",
            where="select/sample setting 'n'",
            seen=f"{n} of {len(data)}",
            fix=f"Set n to {len(data)} or less",
        )
    wanted = part == "sample"
    chosen = drawn(data.rows, n, current().stream("sample"))
    places = [i for i, c in enumerate(chosen) if c == wanted]
    if not places:
        least = min(Counter(known(row_name(row)) for row in data).values())
        raise InputError(
            f"no row is left for the {part}",
            where="select/sample",
            seen=n,
            fix=f"Rows of one prompt go together: set n to {least} or more"
            if wanted
            else f"Set n below {len(data)}",
        )
    return data.take(places).with_lineage(filter=f"sample {part} {n}")

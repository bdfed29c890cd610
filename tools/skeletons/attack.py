"""My method: what it damages, for owners who test how well they notice and repair it.

Say what is damaged and how it is recorded, which paper it is from (title, arXiv id), and where this
differs from the paper and why.
"""

from __future__ import annotations

import random

from truing.context import current
from truing.errors import InputError
from truing.method import method
from truing.tables import Row, Table


def damaged(row: Row) -> Row:
    """The row with its preference turned round."""
    return row | {"chosen": row["rejected"], "rejected": row["chosen"]}


@method(paper="my-method", rows={"data": ("pair",)}, within={"share": (0, 1)}, makes="pair")
def my_method(data: Table, *, share: float = 0.1) -> Table:
    """My method: what it damages, for owners who test how well they notice and repair it.

    Args:
        share: of the rows that are damaged, 0 to 1; 0 changes nothing.
    """
    if not 0 <= share <= 1:
        raise InputError("is a share", where="attack/my_method setting 'share'", seen=share)
    pairs = data.expect("pair", where="attack/my_method")
    draw = random.Random(current().stream("rows"))
    hit = set(draw.sample(range(len(pairs)), round(share * len(pairs))))
    rows: list[Row] = []
    for i, row in enumerate(pairs):
        if i not in hit:
            rows.append(row)
            continue
        # The record of what was done: nobody may mistake this table for a sound one.
        lineage = {"parents": [row["id"]], "attack": "my_method"}
        rows.append({k: v for k, v in damaged(row).items() if k != "id"} | {"lineage": lineage})
    return Table("pair", rows, where=data.source)

"""My method: what it does for a user, in one sentence.

    keep a row when words(completion) >= least

Say what every symbol means, which paper it is from (title, arXiv id), and where this differs from
the paper and why.
"""

from __future__ import annotations

from truing.errors import InputError
from truing.method import method
from truing.tables import Row, Table


def keep(row: Row, least: int) -> bool:
    """True for a row that stays."""
    return len(str(row.get("completion", "")).split()) >= least


@method(paper="my-method", within={"least": (0, None)}, makes="data")
def my_method(data: Table, *, least: int = 3) -> Table:
    """My method: what it does for a user, in one sentence.

    Args:
        least: number of words that an answer must have.
    """
    kept = data.where(lambda row: keep(row, least))
    if data.rows and not kept.rows:
        raise InputError("no row is left", where="select/my_method", seen=len(data))
    return kept.with_lineage(filter="my_method")

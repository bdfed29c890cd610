"""Columns of rows that a loss reads as shares or as weights: others are told before training.

`core.batch.reading` calls each loss on the columns of the rows once, before anything is computed,
and adds the row to what is raised here.
"""

from __future__ import annotations

from torch import Tensor

from truing.core.objective import Measurements
from truing.errors import InputError


def share(m: Measurements, name: str, what: str = "a probability") -> Tensor:
    """The column `name`, of any shape; an InputError unless all of it lies in [0, 1].

    Args:
        what: its numbers are, as the error says.
    """
    value = m[name]
    if value.device.type != "cpu":  # a GPU would be waited for, and rows are checked before
        return value
    wrong = (value < 0) | (value > 1)
    if bool(wrong.any()):
        raise InputError(
            f"{what} lies in [0, 1]", where=f"column {name!r}", seen=float(value[wrong][0])
        )
    return value


def weight(m: Measurements) -> Tensor:
    """The column "weight", of any shape; an InputError where a number of it is below 0."""
    value = m["weight"]
    if value.device.type == "cpu" and bool((value < 0).any()):
        raise InputError(
            "a weight is not negative", where="column 'weight'", seen=float(value.min())
        )
    return value

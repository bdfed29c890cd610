"""Answers that were cut off at the length limit, where a method keeps them out of its loss.

Their rewards still count in their group. The share of answers that is left out is recorded as
"dropped"; a rollout of which all are teaches nothing, which is said once (`online_record`).

Shapes: U groups, K answers.
"""

from __future__ import annotations

from torch import Tensor

from truing.core.objective import Measurements

DROPPED = "dropped"


def ended(m: Measurements, drop: bool) -> Tensor | None:
    """1.0 for answers that came to their end, [U, K]; None where the others are not dropped."""
    return m["finished"] if drop else None


def dropped(r: Measurements, drop: bool) -> dict[str, Tensor]:
    """What to record of a rollout: 1.0 for each of its answers that is left out, 0.0 else."""
    return {DROPPED: 1 - r["finished"][r.there_UK > 0]} if drop else {}

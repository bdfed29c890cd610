"""Micro-batches of packed trees, and what the loss of one adds to its step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from truing.core.batch.parts import Part
from truing.core.objective import Loss
from truing.core.tree import Node, Packed


@dataclass(frozen=True)
class Micro:
    """Some units of a step: their numbers, trees, place in the step, and tokens.

    An idle one is computed for the sake of the other processes and counts for nothing.
    """

    rows: Sequence[int]
    trees: Sequence[Node]
    place: slice
    packed: Packed
    ref_logp_UKT: Tensor | None = None
    idle: bool = False


def part_of(
    loss: Loss,
    weights: Sequence[float],
    rows: Sequence[int],
    total: int,
    facts: Mapping[str, tuple[Tensor, float]],
) -> Part:
    """A micro-batch's share: each term over its own weight in the whole step.

    The engine divides by the sum of the parts' weights; these count units, so a share is given
    times the number of units of the step.

    Args:
        weights: of each term, in the whole step.
        rows: of this micro-batch; `total` are those of the step.
        facts: what else is recorded, as sums with how many each is of.
    """
    shares: list[Tensor] = []
    per_row_U: Tensor | float = 0.0
    for (scale, value, weight), whole in zip(loss.terms(), weights, strict=True):
        per_row_U = per_row_U + value.detach().reshape(len(rows), -1).sum(1)
        if whole:
            shares.append(scale * (value * weight).sum() * (total / whole))
    named = (rows, torch.as_tensor(per_row_U))
    return Part(
        torch.stack(shares).sum(), float(len(rows)), loss.sums() | dict(facts), per_row=named
    )


def constant(value: float) -> Callable[[slice], Tensor]:
    """The value for any rows of a chunk: what statistics read of settings."""
    return lambda part: torch.tensor(value)

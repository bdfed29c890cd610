"""What the micro-batches of a step contribute to it, and their sums over all processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from truing.core.trainer import distributed


@dataclass(frozen=True)
class Part:
    """One micro-batch's contribution to a step.

    Args:
        loss: sum over its units of loss times weight; differentiated.
        weight: sum of the weights.
        metrics: name -> (sum, weight); averaged over the step.
        value: what to report in place of `loss` when that is a stand-in with the same gradient.
        per_row: loss of each row of this part, to name those that are not finite.
    """

    loss: Tensor
    weight: Tensor | float
    metrics: Mapping[str, tuple[Tensor, float]] = field(default_factory=dict)
    value: Tensor | None = None
    per_row: tuple[Sequence[int], Tensor] | None = None


class Sums:
    """Sums over the parts of a step, kept on the device until its end."""

    def __init__(self) -> None:
        self.loss: Tensor | float = 0.0
        self.weight: Tensor | float = 0.0
        self.metrics: dict[str, tuple[Tensor | float, float]] = {}
        self.per_row: list[tuple[Sequence[int], Tensor]] = []

    def add(self, part: Part) -> None:
        """Count a micro-batch in."""
        self.loss = self.loss + (part.loss if part.value is None else part.value).detach()
        self.weight = self.weight + part.weight
        for name, (value, weight) in part.metrics.items():
            total, of = self.metrics.get(name, (0.0, 0.0))
            self.metrics[name] = (total + value, of + weight)
        if part.per_row is not None:
            self.per_row.append(part.per_row)

    def join(self) -> None:
        """Add what the other processes have summed."""
        if distributed.now().size == 1:
            return
        metrics = {n: (torch.as_tensor(v).cpu(), w) for n, (v, w) in self.metrics.items()}
        loss = torch.as_tensor(self.loss).cpu()
        own = Part(loss, float(self.weight), metrics)
        self.loss, self.weight, self.metrics = 0.0, 0.0, {}
        for part in distributed.everyone(own):
            self.add(part)

    def means(self) -> dict[str, float]:
        """Of each metric its mean."""
        return {n: float(s) / w for n, (s, w) in self.metrics.items() if w}

    def rows(self) -> list[int]:
        """Rows that were computed, which a task may take from elsewhere than the engine's order."""
        own = [row for rows, _ in self.per_row for row in rows]
        return list(dict.fromkeys(distributed.gathered(own)))

    def culprits(self) -> list[int]:
        """Rows whose own loss is not finite."""
        own = [
            row
            for rows, values in self.per_row
            for row, good in zip(rows, values.isfinite().tolist(), strict=True)
            if not good
        ]
        return distributed.gathered(own)

"""The outer loop of weight restoration: warm-up, the choice of mode, checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from truing.context import current
from truing.core.trunk import Batch, Trunk

if TYPE_CHECKING:
    from truing.recover.weight_restore import Restorer


def _count(mask: Mapping[str, Tensor]) -> int:
    return sum(int(m.sum()) for m in mask.values())


class Loop:
    """Runs recovery steps and measures the task at checkpoints.

    Args:
        repair: the model under repair.
        trusted: the trusted model's trunk.
        loss: of hidden states [B, D] against a direction [D].
        refuse: batches of token ids of prompts to refuse.
        task: batches of token ids of task prompts.
        value: measures the task on the model under repair.
    """

    def __init__(
        self,
        repair: Restorer,
        trusted: Trunk,
        loss: Callable[[Tensor, Tensor], Tensor],
        *,
        refuse: Sequence[Batch],
        task: Sequence[Batch],
        value: Callable[[], float],
    ) -> None:
        self.repair, self.refuse, self.task, self.value = repair, refuse, task, value
        self.harm = partial(_flip, loss, trusted.mean_state(refuse))
        self.benign = partial(_flip, loss, repair.trunk.mean_state(task))
        self.start = value()
        self.saved: list[tuple[float, dict[str, Tensor]]] = []

    def step(self, number: int, rate: float, back: float | None, accumulate: bool) -> None:
        """One step; `back` is the rollback rate in rollback mode, else None."""
        repair = self.repair
        if back is not None or not accumulate:
            repair.clear()
        loss = repair.trunk.add_gradients(self.refuse, self.harm)
        restored = repair.restore(rate)
        returned: Mapping[str, Tensor] = {}
        if back is not None:
            repair.clear()
            repair.trunk.add_gradients(self.task, self.benign)
            returned = repair.give_back(back, restored)
        current().metric(
            step=number,
            # Raw means share a large component, so that cos starts near 1: 1 - cos is read.
            distance=1.0 + loss,
            restored=_count(restored),
            given_back=_count(returned),
            rollback=back is not None,
        )

    def measure(self, number: int) -> float:
        """Task value now, kept with the checkpoint."""
        value, places = self.value(), self.repair.places()
        self.saved.append((value, places))
        share = sum(map(len, places.values())) / self.repair.total
        current().metric(step=number, task=value, task_before=self.start, changed_share=share)
        return value

    def recover(
        self,
        rate: float,
        rollback_rate: float,
        steps: int,
        warmup: int,
        save_every: int,
        drop: float,
        accumulate: bool,
    ) -> dict[str, Tensor]:
        """Flat places to restore, by name: those of the chosen checkpoint."""
        floor = self.start * (1.0 - drop)
        back: float | None = None
        number = 0
        while number < steps:
            number += 1
            self.step(number, rate, back, accumulate)
            current().progress(number, steps, "restoring weights")
            if number == warmup and back is None:
                if self.measure(number) < floor:
                    self.repair.restart()
                    self.saved.clear()
                    back, number = rollback_rate, 0
            elif number % save_every == 0 or number == steps:
                self.measure(number)
        within = [places for value, places in self.saved if value >= floor]
        if within:
            return within[-1]
        return max(self.saved, key=lambda s: s[0])[1] if self.saved else {}


def _flip(
    loss: Callable[[Tensor, Tensor], Tensor], direction_D: Tensor, states_BD: Tensor
) -> Tensor:
    return loss(states_BD, direction_D)

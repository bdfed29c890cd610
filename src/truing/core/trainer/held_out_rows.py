"""Held-out rows of a language model's training: read as the training rows are, measured as a step.

The loss is that of one step over all of them: the mean over their tokens, pairs or groups, whatever
the batch size. An objective that compares the rows of a step with each other gets steps of about
`batch` rows, drawn once in a run, and the mean over them by rows.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from truing.context import aside, current
from truing.core.batch.training_rows import Unit
from truing.core.held_out import INPUT, HeldOut, Watch
from truing.core.objective import Objective
from truing.core.trainer import distributed
from truing.core.training import Hook
from truing.core.tree import Node

if TYPE_CHECKING:
    from truing.core.trainer.text_task import TextTask


def told_apart() -> AbstractContextManager[None]:
    """What is observed inside is of held-out rows, and named so; seeds and progress stay."""
    return aside(f"{INPUT}_")


@dataclass(frozen=True)
class HeldOutRows:
    """Rows that are not trained on.

    Args:
        units: as token branches.
        hook: the method's, of their own, without what is random in training alone.
        steps: numbers of the units that are computed as one step each.
        batch: rows that are computed at once, whatever the step.
    """

    units: list[Unit]
    hook: Hook
    steps: list[list[int]]
    batch: int

    @property
    def trees(self) -> list[Node]:
        """Their trees, as they are."""
        return [unit.tree() for unit in self.units]

    def view(self, task: TextTask) -> TextTask:
        """The task as it is now, on these rows."""
        return task.beside(self.units, self.hook, self.batch)

    def watched(self, task: TextTask, watch: Watch) -> HeldOut:
        """What the loop measures, once the task is complete."""
        return HeldOut(self.view(task), self.steps, watch)

    def warn(self, units: Sequence[Unit], where: str) -> None:
        """Say on stderr how many of them are among rows that are trained on."""
        twice = self.among(units)
        if twice and distributed.leads():
            text = f"{where}: warning: {twice} of {len(self.units)} rows are trained on, too"
            print(f"{text}; their loss says nothing of rows that were not seen", file=sys.stderr)

    def among(self, units: Sequence[Unit]) -> int:
        """How many of them are among rows that are trained on."""

        def given(unit: Unit) -> tuple[object, ...]:
            """Without answers of the model's own, which may be others or not yet drawn."""
            return unit.prompt, self.hook.given(unit), unit.dialogue

        known = {given(unit) for unit in units}
        return sum(given(unit) in known for unit in self.units)


def held_rows(spec: Objective, units: list[Unit], hook: Hook, batch: int) -> HeldOutRows:
    """The rows with the steps that an objective measures them in."""
    steps = [list(range(len(units)))]
    if spec.unit == "batch" or "mismatched" in spec.needs:
        source = torch.Generator().manual_seed(current().stream(INPUT))
        drawn = torch.randperm(len(units), generator=source)
        # None of them much smaller than in training: a sorted batch of one compares nothing.
        steps = [part.tolist() for part in drawn.tensor_split(max(1, len(units) // batch))]
    return HeldOutRows(units, hook, steps, batch)

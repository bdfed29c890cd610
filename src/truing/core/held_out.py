"""The loss on held-out rows while a model is trained: when it is measured, what follows from it.

Rows that are not trained on go through the task's own loss, as it is computed in training but
without gradients and without whatever is random there. That is done before the first update, after
every `eval_every` updates and after the last. The metrics are named as in training, with
"held_out/" before them.

Each measurement is a row of the run's history, which its checkpoints hold, and every decision is a
function of that history: a run that was killed decides as it would have without the kill. An update
with a new lowest loss has a checkpoint of its own where the best model is wanted, and that one
stays until the end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal

import torch

from truing.core.parts import Sums
from truing.errors import InputError

if TYPE_CHECKING:
    from truing.context import Json
    from truing.core.engine import Task

INPUT = "held_out"
PREFIX = "held_out/"
LOSS = f"{PREFIX}loss"
TIMES = 5  # measurements of a run, where nothing is said, beside that of the start
ABOUT = "rows like those of `data` that are not trained on: the loss on them is measured meanwhile."

History = Sequence[Mapping[str, "Json"]]


@dataclass(frozen=True, kw_only=True)
class Watch:
    """When the loss on held-out rows is measured, and what follows from it.

    Args:
        eval_every: updates between two measurements of the held-out loss; 0 makes five in a run.
            It is also measured before the first update and after the last.
        keep: which model is the result: that after the last update, or best, that after the update
            with the lowest held-out loss.
        patience: end the training after so many measurements in a row without a held-out loss
            lower than all before; 0 does not.
    """

    eval_every: int = 0
    keep: Literal["last", "best"] = "last"
    patience: int = 0

    def check(self, where: str) -> None:
        """Raise an InputError that names the first setting out of range."""
        for name in ("eval_every", "patience"):
            value = getattr(self, name)
            if value < 0:
                raise InputError(f"setting {name!r} must be at least 0", where=where, seen=value)

    def check_unused(self, where: str) -> None:
        """Raise an InputError for a setting that means nothing, as no held-out rows are given."""
        for one in fields(self):
            value = getattr(self, one.name)
            if value != one.default:
                raise InputError(
                    f"setting {one.name!r} counts for nothing: there are no held-out rows",
                    where=where,
                    seen=value,
                    fix=f"Give rows that are not trained on as the input {INPUT!r}, such as the "
                    "part that select/split holds out",
                )

    def due(self, step: int, total: int) -> bool:
        """Whether to measure after update `step` of `total`; 0 is before the first."""
        every = self.eval_every or math.ceil(total / TIMES)
        return step == total or step % every == 0


@dataclass(frozen=True)
class HeldOut:
    """Held-out rows as the loop measures them.

    Args:
        task: over these rows, with the parameters that are trained.
        steps: numbers of the rows that are computed as one step's, each of which is their mean.
        watch: when, and what follows.
    """

    task: Task
    steps: Sequence[Sequence[int]]
    watch: Watch

    def measured(self, step: int) -> dict[str, float]:
        """Loss and metrics after update `step`, by name.

        Raises:
            InputError: no row counts in the loss.
        """
        sums = Sums()
        with torch.no_grad():
            for rows in self.steps:
                for part in self.task.parts(rows, step):
                    sums.add(part)
        sums.join()
        if not float(sums.weight):
            raise InputError("no held-out row counts in the loss", where=self.task.name)
        means = {"loss": float(sums.loss / sums.weight), **sums.means()}
        return {f"{PREFIX}{name}": value for name, value in means.items()}


def losses(history: History) -> list[tuple[int, float]]:
    """(update, held-out loss) of each measurement; a loss that is not finite is as bad as any."""
    made: list[tuple[int, float]] = []
    for row in history:
        step, loss = row.get("step"), row.get(LOSS)
        if isinstance(step, int) and isinstance(loss, (int, float)):
            made.append((step, loss if math.isfinite(loss) else math.inf))
    return made


def best(history: History) -> int:
    """The first update after which the held-out loss was lowest; 0 where none was measured yet."""
    made = [(loss, step) for step, loss in losses(history) if step]
    return min(made)[1] if made else 0


def has_stalled(history: History, patience: int) -> bool:
    """Whether the last `patience` measurements have not lowered the held-out loss."""
    seen = [loss for _, loss in losses(history)]
    return bool(patience and seen) and len(seen) - 1 - seen.index(min(seen)) >= patience


def told(history: History, keep: str, done: int, total: int) -> tuple[dict[str, Json], str]:
    """What to record of a run at its end, and to say of it."""
    seen, chosen = dict(losses(history)), best(history)
    facts: dict[str, Json] = {"held_out_lowest_after": chosen}
    said = f"held-out loss {seen[chosen]:.4g} after update {chosen}"
    if 0 in seen:
        said += f", the lowest; {seen[0]:.4g} at first"
    if done < total:
        facts["ended_after"] = done
        said += f"; ended after {done} of {total} updates"
    if keep == "best":
        said += f"; the model after update {chosen} is kept"
    if 0 in seen and seen[chosen] >= seen[0]:
        said += "; warning: no update has lowered it"
    return facts, said

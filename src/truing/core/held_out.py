"""What is measured on held-out rows while a model is trained: when, and what follows from it.

Rows that are not trained on go through the task's own loss, as it is computed in training but
without gradients and without whatever is random there. That is done before the first update, after
every `eval_every` updates and after the last. The metrics are named as in training, with
"held_out/" before them.

Online methods have prompts in their place, or tasks of their environment: the policy answers them
as it is then, and the reward of its answers is what counts (`held_out_online`).

Each measurement is a row of the run's history, which its checkpoints hold, and every decision is a
function of these: a run that was killed decides as it would have without the kill. An update with a
new lowest loss, or highest reward, has a checkpoint of its own where the best model is wanted, and
that one stays until the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Protocol

from truing.core.bounds import check_bounds
from truing.errors import InputError

if TYPE_CHECKING:
    from truing.context import Json
    from truing.core.engine import Task

INPUT = "held_out"
PREFIX = "held_out/"
TIMES = 5  # measurements of a run, where nothing is said, beside that of the start
ABOUT = "rows like those of `data` that are not trained on: the loss on them is measured meanwhile."


@dataclass(frozen=True)
class HeldOutMeasure:
    """What decides about updates: the metric of this name, and whether more of it is better."""

    name: str
    higher: bool = False

    @property
    def key(self) -> str:
        """Its name among what is recorded."""
        return f"{PREFIX}{self.name}"

    @property
    def best(self) -> str:
        """What the best value is called."""
        return "highest" if self.higher else "lowest"

    @property
    def worst(self) -> float:
        """A value that is as bad as any."""
        return -math.inf if self.higher else math.inf

    def better(self, value: float, than: float) -> bool:
        """Whether one value is better than another."""
        return value > than if self.higher else value < than


LOSS, REWARD = HeldOutMeasure("loss"), HeldOutMeasure("reward", higher=True)


@dataclass(frozen=True, kw_only=True)
class Watch:
    """When held-out rows are measured, and what follows from it.

    Where the reward of answers is measured, and no loss, the best is the highest.

    Args:
        eval_every: updates between two measurements of the held-out loss; 0 makes five in a run.
            It is also measured before the first update and after the last.
        keep_best: make the result the model after the update with the lowest held-out loss, not
            that after the last.
        patience: end the training after so many measurements in a row without a held-out loss
            lower than all before; 0 does not.
    """

    eval_every: int = 0
    keep_best: bool = False
    patience: int = 0

    def check(self, where: str) -> None:
        """Raise an InputError that names the first setting out of range."""
        check_bounds(vars(self), {"eval_every": (0, None), "patience": (0, None)}, where)

    def check_unused(self, at: Callable[[str], str]) -> None:
        """Raise an InputError for a setting that means nothing, as no held-out rows are given.

        Args:
            at: where a setting stands.
        """
        for one in fields(self):
            value = getattr(self, one.name)
            if value != one.default:
                raise InputError(
                    f"setting {one.name!r} counts for nothing: there are no held-out rows",
                    where=at(one.name),
                    seen=value,
                    fix=f"Give rows that are not trained on as the input {INPUT!r}, such as the "
                    "part that select/split holds out",
                )

    def due(self, step: int, total: int) -> bool:
        """Whether to measure after update `step` of `total`; 0 is before the first."""
        every = self.eval_every or math.ceil(total / TIMES)
        return step == total or step % every == 0


def watching(held_out: object, where: str, **settings: object) -> Watch:
    """When held-out rows are measured, and what follows from it: checked.

    Args:
        held_out: these rows; None where none are given.
        where: what errors name.
        settings: those of `Watch`, or some of them.
    Raises:
        InputError: a setting out of range, or one that means nothing without such rows.
    """
    watch = Watch(**settings)  # type: ignore[arg-type]
    watch.check(where)
    if held_out is None:
        watch.check_unused(lambda _: where)
    return watch


class Held(Protocol):
    """What the loop measures between updates."""

    @property
    def watch(self) -> Watch:
        """When, and what follows."""
        ...

    @property
    def measure(self) -> HeldOutMeasure:
        """What decides."""
        ...

    def measured(self, step: int) -> dict[str, float]:
        """Metrics after update `step`, by name, that of `measure` among them."""
        ...


@dataclass(frozen=True)
class HeldOut:
    """Held-out rows as the loop measures them.

    Args:
        task: over these rows, with the parameters that are trained.
        steps: numbers of the rows that are computed as one step's, each of which is their mean.
        watch: when, and what follows.
        measure: what decides.
    """

    task: Task
    steps: Sequence[Sequence[int]]
    watch: Watch
    measure: HeldOutMeasure = LOSS

    def measured(self, step: int) -> dict[str, float]:
        """Loss and metrics after update `step`, by name.

        Raises:
            InputError: no row counts in the loss.
        """
        import torch

        from truing.core.batch.parts import Sums

        sums = Sums()
        with torch.no_grad():
            for rows in self.steps:
                for part in self.task.parts(rows, step):
                    sums.add(part)
        sums.join()
        if not float(sums.weight):
            raise InputError(
                "no held-out row counts in the loss",
                where=self.task.name,
                fix="Give held_out rows whose answers are whole, and whose weights are above 0",
            )
        means = {"loss": float(sums.loss / sums.weight), **sums.means()}
        return {f"{PREFIX}{name}": value for name, value in means.items()}


class Course:
    """What was measured in a run so far, and what follows from it, known at once.

    A value that is not finite is as bad as any.

    Args:
        measure: what decides.
        history: of the run, as far as it has come; none where it begins.
    """

    def __init__(self, measure: HeldOutMeasure, history: Sequence[Mapping[str, Json]] = ()) -> None:
        self.measure = measure
        self.first: float | None = None  # before the first update
        self.newest: float | None = None
        self.best = 0  # the first update after which the value was best; 0 before any
        self.best_value = measure.worst
        self.waited = 0  # measurements since the last one with a value better than all before
        self._record = measure.worst
        for row in history:
            self.add(row)

    def add(self, row: Mapping[str, Json]) -> None:
        """Take a row of the history; nothing comes of one that measures nothing held out."""
        measure = self.measure
        step, value = row.get("step"), row.get(measure.key)
        if not (isinstance(step, int) and isinstance(value, (int, float))):
            return
        value = value if math.isfinite(value) else measure.worst
        better = self.newest is None or measure.better(value, self._record)
        self.waited = 0 if better else self.waited + 1
        self._record = value if better else self._record
        self.newest = value
        if not step:
            self.first = value
        elif not self.best or measure.better(value, self.best_value):
            self.best, self.best_value = step, value

    def told(self, watch: Watch, done: int, total: int) -> tuple[dict[str, Json], str]:
        """What to record of a run of `done` updates out of `total` at its end, and to say of it."""
        measure = self.measure
        facts: dict[str, Json] = {f"held_out_{measure.best}_after": self.best}
        said = f"held-out {measure.name} {self.best_value:.4g} after update {self.best}"
        if self.first is not None:
            said += f", the {measure.best}; {self.first:.4g} at first"
        if done < total:
            facts["ended_after"] = done
            said += f"; ended after {done} of {total} updates"
        if watch.keep_best:
            said += f"; the model after update {self.best} is kept"
        if self.first is not None and not measure.better(self.best_value, self.first):
            said += f"; warning: no update has {'raised' if measure.higher else 'lowered'} it"
        return facts, said

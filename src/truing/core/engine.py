"""The one training loop: accumulate, clip, schedule, checkpoint, resume with the same bits.

It trains any `torch.nn.Module` through a `Task`, which splits the rows of a step into micro-batches
and returns for each the summed loss, the weight of that sum and what to report. Gradients are sums
too, divided once by the weight of the whole step, so that the split cannot change the result.

Everything random is a function of the seed and the step: the order of rows, and the state of
torch's generators, which is set before each step. A checkpoint therefore holds parameters,
optimizer and the task's own state, and a run that was killed goes on with the same bits.

That holds on a CPU. On a GPU data order and random numbers are the same, too, but bits may differ
in rounding from run to run: the fast kernels of attention's backward pass add in no fixed order.
Torch's deterministic mode is not switched on, since with warnings alone it leaves these kernels as
they are, and without stops at operations that have no other.

Several processes may run the loop together (`distributed`): a task gives each its share of the
rows, and what is summed over micro-batches here is then summed over processes.

Between updates the loss on rows that are not trained on, or the reward of answers to such prompts,
may be measured (`held_out`): it costs forward passes and changes no update.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from truing.context import Context, Json, current
from truing.core.batch.parts import Part, Sums
from truing.core.held_out import LOSS, Course, Held
from truing.core.trainer import distributed
from truing.core.trainer.checkpoint import Checkpoints
from truing.core.training import State, Training
from truing.errors import Diverged, InputError, Stopped

CHECKPOINT_SECONDS = 30.0  # least time between two checkpoints
CHECKPOINT_SHARE = 0.05  # of the time may go into writing them


class Task(Protocol):
    """What the loop trains. Rows are referred to by their number."""

    name: str

    def __len__(self) -> int:
        """Number of rows."""
        ...

    def trained(self) -> Mapping[str, nn.Parameter]:
        """Parameters that the optimizer changes, by name."""
        ...

    def parts(self, rows: Sequence[int], step: int) -> Iterator[Part]:
        """This process's micro-batches of a step, one by one: each is differentiated at once.

        Where gradients are off, nothing is random that is so in training alone.
        """
        ...

    def after_step(self, step: int) -> None:
        """Called after update `step` (counted from 1)."""
        ...

    def state(self) -> State:
        """What a checkpoint must hold besides parameters and optimizer."""
        ...

    def load_state(self, state: State) -> None:
        """Take back what `state` gave."""
        ...

    def row_name(self, row: int) -> str:
        """How errors call a row."""
        ...


@runtime_checkable
class Paced(Protocol):
    """A task some of whose parameters learn at a rate of their own."""

    def pace(self, name: str) -> float:
        """Learning rate of a parameter over the run's."""
        ...


@runtime_checkable
class Grouped(Protocol):
    """A task of whose groups of rows each step has as many as of the others."""

    def groups(self) -> Sequence[int]:
        """Number of each row's group; [] where all are one."""
        ...


@dataclass(frozen=True)
class Trained:
    """What a run did: updates made, metrics of each, wall seconds of this process."""

    steps: int
    history: list[dict[str, Json]]
    seconds: float


class Order:
    """Which rows make up a step: permutations of all rows laid end to end, cut into steps.

    Groups of rows have permutations of their own, and places go to the groups in turn: a step has
    as many places for each, give or take one. In as many steps as an epoch of all rows has, a group
    with fewer rows than others comes round more often than they do. A row counts once in a step: a
    group with fewer rows than places there comes with fewer, and the step is as much smaller.

    Args:
        groups: number of each row's group; none for a single one.
    """

    def __init__(self, rows: int, batch: int, context: Context, groups: Sequence[int] = ()) -> None:
        self.rows, self.batch, self.context = rows, min(batch, rows), context
        numbers = sorted(set(groups))
        self.groups = [[i for i, g in enumerate(groups) if g == n] for n in numbers]
        self.groups = self.groups or [list(range(rows))]
        self._made: dict[tuple[int, int], list[int]] = {}

    def _epoch(self, epoch: int, group: int = 0) -> list[int]:
        if (group, epoch) not in self._made:
            own = self.groups[group]
            name = f"order/{epoch}" if len(self.groups) == 1 else f"order/{group}/{epoch}"
            source = torch.Generator().manual_seed(self.context.stream(name))
            late = ((k, o) for k, o in self._made.items() if k[0] != group or k[1] >= epoch - 1)
            self._made = dict(late)
            drawn = torch.randperm(len(own), generator=source).tolist()
            self._made[group, epoch] = [own[i] for i in drawn]
        return self._made[group, epoch]

    def step(self, step: int, end: int) -> list[int]:
        """Rows of update `step` (from 0); places from `end` on do not exist.

        The last step has a row of each group all the same. A row that would appear twice, where an
        epoch ends inside the step, counts once.
        """
        first, many = step * self.batch, len(self.groups)
        last = min(first + self.batch, max(end, first + many))
        rows: list[int] = []
        for place in range(first, last):
            turn, group = divmod(place, many)
            epoch, at = divmod(turn, len(self.groups[group]))
            rows.append(self._epoch(epoch, group)[at])
        return list(dict.fromkeys(rows))


def optimizer_for(
    parameters: Sequence[nn.Parameter], settings: Training, paces: Sequence[float] = ()
) -> torch.optim.AdamW:
    """AdamW, in one fused kernel where the dtype and device have one.

    Its groups have a "pace", what their learning rate is over the run's: 1 unless `paces` says.
    """
    by_pace: dict[float, list[nn.Parameter]] = {}
    for parameter, pace in zip(parameters, paces or [1.0] * len(parameters), strict=True):
        by_pace.setdefault(pace, []).append(parameter)
    groups = [{**g, "pace": pace} for pace, p in by_pace.items() for g in distributed.alike(p)]
    kinds = {(p.device.type, p.dtype) for p in parameters}
    fused = all(device in ("cpu", "cuda") and dtype.is_floating_point for device, dtype in kinds)
    return torch.optim.AdamW(
        groups,
        lr=0.0,
        betas=(0.9, settings.adam_beta2),
        eps=settings.adam_epsilon,
        weight_decay=settings.weight_decay,
        fused=fused,
    )


def _scale(parameters: Sequence[nn.Parameter], weight: Tensor, clip: float) -> Tensor:
    """Divide gradients by the step's weight and clip them; their norm before clipping."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = distributed.norm(grads) / weight
    factor = 1 / weight
    if clip:
        factor = factor * (clip / (norm + 1e-6)).clamp(max=1.0)
    for grad in grads:
        distributed.local(grad).mul_(factor.to(grad.dtype))
    return norm


def checkpoints_of(key: str) -> Checkpoints:
    """Those of the run that `key` names, in the step's folder."""
    return Checkpoints(distributed.agree(current().folder) / f"checkpoints-{key}", key)


class Loop:
    """One run of `train`: see there."""

    def __init__(
        self, task: Task, settings: Training, key: str, peak: float, held: Held | None = None
    ) -> None:
        settings.check(task.name)
        if not len(task):
            raise InputError("there are no rows to train on", where=task.name)
        self.task, self.settings, self.context, self.peak = task, settings, current(), peak
        self.named = dict(task.trained())
        self.parameters = list(self.named.values())
        paces = [task.pace(n) for n in self.named] if isinstance(task, Paced) else ()
        self.optimizer = optimizer_for(self.parameters, settings, paces)
        self.total = settings.total(len(task))
        groups = task.groups() if isinstance(task, Grouped) else ()
        self.order = Order(len(task), settings.batch, self.context, groups)
        self.end = settings.end(len(task))
        self.checkpoints = checkpoints_of(key)
        self.history: list[dict[str, Json]] = []
        self.held, self.seen = held, Course(held.measure if held is not None else LOSS)

    def run(self) -> Trained:
        """Train to the end, from the last checkpoint where there is one."""
        began = time.monotonic()
        devices = sorted({p.device.index or 0 for p in self.parameters if p.is_cuda})
        with torch.random.fork_rng(devices=devices):
            start = self._resume()
            if not start:
                self._watch(0)
            done = self._updates(start)
            self._warn()
            if self.held is not None:
                self._choose(self.held, done)
        return Trained(done, self.history, time.monotonic() - began)

    def _updates(self, start: int) -> int:
        """Make all updates from `start` on, or those until the run is to end; how many in all."""
        saved, cost = time.monotonic(), 0.0
        for step in range(start, self.total):
            if self._stalled():
                return step
            self._step(step)
            lowest = self._watch(step + 1)
            if distributed.leads():
                self.context.progress(step + 1, self.total, self._label())
            now = time.monotonic()
            last = step + 1 == self.total or self._stalled()
            due = now - saved > max(CHECKPOINT_SECONDS, cost / CHECKPOINT_SHARE)
            if last or lowest or distributed.agree(due):
                self._save(step + 1)
                saved = time.monotonic()
                cost = saved - now
        return self.total

    def _warn(self) -> None:
        """Say on stderr where no update had anything to follow."""
        norms = [row["grad_norm"] for row in self.history if "grad_norm" in row]
        if norms and not any(norms) and distributed.leads():
            print(
                f"{self.task.name}: warning: the gradient was 0 in all {len(norms)} updates, so "
                "nothing was learnt; look at the settings that weigh the loss, and where answers "
                "are rewarded, whether their rewards differ",
                file=sys.stderr,
            )

    def _resume(self) -> int:
        found = self.checkpoints.last()
        if found is None:
            return 0
        step, self.history = found.step, found.history
        self.seen = Course(self.seen.measure, found.history)
        found.restore(self.named, self.optimizer)
        self.task.load_state(found.state)
        for row in self.history:
            self.context.metric(**row)
        return step

    def _save(self, step: int) -> None:
        kept = self.seen.best if self._keeps_best() else 0
        self.checkpoints.save(
            step, self.named, self.optimizer, self.task.state(), self.history, spare=kept
        )

    # Held-out rows

    def _keeps_best(self) -> bool:
        return self.held is not None and self.held.watch.keep_best

    def _stalled(self) -> bool:
        patience = self.held.watch.patience if self.held is not None else 0
        return bool(patience) and self.seen.waited >= patience

    def _label(self) -> str:
        """What the progress is called, with the newest held-out loss or reward."""
        newest, name = self.seen.newest, self.seen.measure.name
        seen = f", held-out {name} {newest:.4g}" if newest is not None else ""
        return f"training ({self.task.name}){seen}"

    def _watch(self, step: int) -> bool:
        """Measure held-out rows after update `step`, where it is time; whether it is to be kept."""
        if self.held is None or not self.held.watch.due(step, self.total):
            return False
        torch.manual_seed(self.context.stream(f"held_out/{step}") + distributed.now().rank)
        facts: dict[str, Json] = {"step": step, **self.held.measured(step)}
        self.history.append(facts)
        self.seen.add(facts)
        self.context.metric(**facts)
        return self._keeps_best() and bool(step) and self.seen.best == step

    def _choose(self, held: Held, done: int) -> None:
        """Say what was measured in the end, and go back to the best update where that is kept."""
        facts, said = self.seen.told(held.watch, done, self.total)
        self.context.metric(**facts)
        if distributed.leads():
            print(f"{self.task.name}: {said}", file=sys.stderr)
        chosen = self.seen.best
        if not self._keeps_best() or chosen == done:
            return
        found, measure = self.checkpoints.at(chosen), self.seen.measure
        if found is None:
            raise Stopped(
                f"the checkpoint after update {chosen}, where the held-out {measure.name} was "
                f"{measure.best}, cannot be read",
                where=self.task.name,
                seen=self.checkpoints.folder,
                fix="Delete that folder and train again, or leave keep_best out",
            )
        found.restore(self.named, self.optimizer)
        self.task.load_state(found.state)

    def _step(self, step: int) -> None:
        began = time.monotonic()
        # Other numbers in each process: rows that lie in two must not share their dropout.
        torch.manual_seed(self.context.stream(f"step/{step}") + distributed.now().rank)
        rows = self.order.step(step, self.end)
        self.optimizer.zero_grad(set_to_none=True)
        sums = Sums()
        for part in self.task.parts(rows, step):
            part.loss.backward()
            sums.add(part)
        distributed.sum_gradients(self.parameters)
        sums.join()
        weight = torch.as_tensor(sums.weight, dtype=torch.float32)
        updated = float(weight) > 0 and any(p.grad is not None for p in self.parameters)
        loss, norm = 0.0, 0.0
        rate = self.peak * self.settings.rate(step, self.total)
        if updated:
            norm = float(_scale(self.parameters, weight, self.settings.clip))
            loss = float(sums.loss / weight)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise self._broken(step, rows, sums, loss, norm)
            for group in self.optimizer.param_groups:
                group["lr"] = rate * group["pace"]
            self.optimizer.step()
            # The fused kernel writes without counting it as a change, on which caches rely.
            torch.autograd.graph.increment_version(self.parameters)
        self.task.after_step(step + 1)
        facts: dict[str, Json] = {"step": step + 1, "loss": loss, "lr": rate, "grad_norm": norm}
        facts |= sums.means()
        self.history.append(facts)
        self.context.metric(**facts, seconds=round(time.monotonic() - began, 3))

    def _broken(
        self, step: int, rows: Sequence[int], sums: Sums, loss: float, norm: float
    ) -> Diverged:
        guilty = sums.culprits()
        names = [self.task.row_name(r) for r in guilty or sums.rows() or rows]
        last = self.checkpoints.steps()
        kept = f"the checkpoint after step {last[-1]} is kept" if last else "no step was saved yet"
        what = "the loss" if not math.isfinite(loss) else "the gradient"
        return Diverged(
            f"{what} is not finite at step {step + 1} of {self.total}; {kept}",
            where=self.task.name,
            seen={
                "loss": loss,
                "grad_norm": norm,
                "rows with a loss that is not finite" if guilty else "rows of the batch": names,
            },
            fix="Look at these rows, or lower the learning rate",
        )


def train(
    task: Task,
    settings: Training,
    *,
    key: str = "",
    peak: float = 0.0,
    held: Held | None = None,
) -> Trained:
    """Train `task` to the end, resuming from its checkpoint in the step's folder.

    Args:
        task: the module, its rows and its loss.
        settings: how.
        key: tells runs in one folder apart: hash of whatever the result depends on.
        peak: learning rate; 0 takes the settings'.
        held: what is measured meanwhile, and what follows from it.
    Raises:
        InputError: no rows, or settings out of range.
        Diverged: loss or gradient is not finite; the last checkpoint is kept.
    """
    return Loop(task, settings, key or task.name, peak or settings.lr or 1e-3, held).run()

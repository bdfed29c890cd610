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
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from truing.context import Context, Json, current
from truing.core import distributed
from truing.core.checkpoint import Checkpoints
from truing.core.training import State, Training
from truing.errors import Diverged, InputError

CHECKPOINT_SECONDS = 30.0  # least time between two checkpoints
CHECKPOINT_SHARE = 0.05  # of the time may go into writing them


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
        """This process's micro-batches of a step, one by one: each is differentiated at once."""
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


@dataclass(frozen=True)
class Trained:
    """What a run did: updates made, metrics of each, wall seconds of this process."""

    steps: int
    history: list[dict[str, Json]]
    seconds: float


class Order:
    """Which rows make up a step: permutations of all rows laid end to end, cut into steps."""

    def __init__(self, rows: int, batch: int, context: Context) -> None:
        self.rows, self.batch, self.context = rows, min(batch, rows), context
        self._made: dict[int, list[int]] = {}

    def _epoch(self, epoch: int) -> list[int]:
        if epoch not in self._made:
            source = torch.Generator().manual_seed(self.context.stream(f"order/{epoch}"))
            self._made = {e: o for e, o in self._made.items() if e >= epoch - 1}
            self._made[epoch] = torch.randperm(self.rows, generator=source).tolist()
        return self._made[epoch]

    def step(self, step: int, end: int) -> list[int]:
        """Rows of update `step` (from 0); places from `end` on do not exist.

        A row that would appear twice, where an epoch ends inside the step, counts once.
        """
        first = step * self.batch
        last = min(first + self.batch, end)
        rows: list[int] = []
        for place in range(first, last):
            epoch, at = divmod(place, self.rows)
            rows.append(self._epoch(epoch)[at])
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
        groups, lr=0.0, betas=(0.9, settings.adam_beta2), eps=settings.adam_epsilon,
        weight_decay=settings.weight_decay, fused=fused,
    )  # fmt: skip


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


class _Sums:
    """Sums over the parts of a step, kept on the device until its end."""

    def __init__(self) -> None:
        self.loss: Tensor | float = 0.0
        self.weight: Tensor | float = 0.0
        self.metrics: dict[str, tuple[Tensor | float, float]] = {}
        self.per_row: list[tuple[Sequence[int], Tensor]] = []

    def add(self, part: Part) -> None:
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

    def culprits(self) -> list[int]:
        """Rows whose own loss is not finite."""
        own = [
            row
            for rows, values in self.per_row
            for row, good in zip(rows, values.isfinite().tolist(), strict=True)
            if not good
        ]
        return distributed.gathered(own)


def checkpoints_of(key: str) -> Checkpoints:
    """Those of the run that `key` names, in the step's folder."""
    return Checkpoints(distributed.agree(current().folder) / f"checkpoints-{key}", key)


class Loop:
    """One run of `train`: see there."""

    def __init__(self, task: Task, settings: Training, key: str, peak: float) -> None:
        settings.check(task.name)
        if not len(task):
            raise InputError("there are no rows to train on", where=task.name)
        self.task, self.settings, self.context, self.peak = task, settings, current(), peak
        self.named = dict(task.trained())
        self.parameters = list(self.named.values())
        paces = [task.pace(n) for n in self.named] if isinstance(task, Paced) else ()
        self.optimizer = optimizer_for(self.parameters, settings, paces)
        self.total = settings.total(len(task))
        self.order = Order(len(task), settings.batch, self.context)
        self.end = settings.end(len(task))
        self.checkpoints = checkpoints_of(key)
        self.history: list[dict[str, Json]] = []

    def run(self) -> Trained:
        """Train to the end, from the last checkpoint where there is one."""
        began = time.monotonic()
        devices = sorted({p.device.index or 0 for p in self.parameters if p.is_cuda})
        with torch.random.fork_rng(devices=devices):
            start = self._resume()
            saved, cost = time.monotonic(), 0.0
            for step in range(start, self.total):
                self._step(step)
                if distributed.leads():
                    self.context.progress(step + 1, self.total, f"training ({self.task.name})")
                now = time.monotonic()
                last = step + 1 == self.total
                due = now - saved > max(CHECKPOINT_SECONDS, cost / CHECKPOINT_SHARE)
                if last or distributed.agree(due):
                    self._save(step + 1)
                    saved = time.monotonic()
                    cost = saved - now
        return Trained(self.total, self.history, time.monotonic() - began)

    def _resume(self) -> int:
        found = self.checkpoints.last()
        if found is None:
            return 0
        step, self.history = found.step, found.history
        found.restore(self.named, self.optimizer)
        self.task.load_state(found.state)
        for row in self.history:
            self.context.metric(**row)
        return step

    def _save(self, step: int) -> None:
        self.checkpoints.save(step, self.named, self.optimizer, self.task.state(), self.history)

    def _step(self, step: int) -> None:
        began = time.monotonic()
        # Other numbers in each process: rows that lie in two must not share their dropout.
        torch.manual_seed(self.context.stream(f"step/{step}") + distributed.now().rank)
        rows = self.order.step(step, self.end)
        self.optimizer.zero_grad(set_to_none=True)
        sums = _Sums()
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
        facts |= {n: float(s) / w for n, (s, w) in sums.metrics.items() if w}
        self.history.append(facts)
        self.context.metric(**facts, seconds=round(time.monotonic() - began, 3))

    def _broken(
        self, step: int, rows: Sequence[int], sums: _Sums, loss: float, norm: float
    ) -> Diverged:
        guilty = sums.culprits()
        names = [self.task.row_name(r) for r in guilty or rows]
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


def train(task: Task, settings: Training, *, key: str = "", peak: float = 0.0) -> Trained:
    """Train `task` to the end, resuming from its checkpoint in the step's folder.

    Args:
        task: the module, its rows and its loss.
        settings: how.
        key: tells runs in one folder apart: hash of whatever the result depends on.
        peak: learning rate; 0 takes the settings'.
    Raises:
        InputError: no rows, or settings out of range.
        Diverged: loss or gradient is not finite; the last checkpoint is kept.
    """
    return Loop(task, settings, key or task.name, peak or settings.lr or 1e-3).run()

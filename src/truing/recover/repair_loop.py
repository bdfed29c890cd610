"""The outer loop of weight restoration: warm-up, the choice of mode, checkpoints.

A step that is stopped goes on to the same bits. Its folder holds the places restored so far and the
sums of gradients, written as seldom as training writes its own checkpoints; and what was measured,
noted as soon as it is known.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from truing.context import Json, current
from truing.core import engine
from truing.core.trainer.checkpoint import Checkpoints
from truing.core.trunk import Batch, Trunk

if TYPE_CHECKING:
    from truing.recover.weight_restore import Restorer

Places = dict[str, Tensor]


def _count(mask: Mapping[str, Tensor]) -> int:
    return sum(int(m.sum()) for m in mask.values())


class Notes:
    """What the step's folder holds of the recovery that `key` names."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.checkpoints = Checkpoints(current().folder / f"repair-{key}", key)
        self._saved, self._cost = time.monotonic(), 0.0

    def once(self, name: str, make: Callable[[], Json]) -> Json:
        """What `make` says; it is asked once, whatever stops and goes on in between."""
        journal, name = current().journal("repair"), f"{self.key}/{name}"
        if name not in journal:
            journal.put(name, make())
        return journal.get(name)

    def direction(self, name: str, trunk: Trunk, batches: Sequence[Batch]) -> Tensor:
        """Mean last-token state [D] of a trunk over the batches, on its device."""
        found = self.once(name, lambda: cast(Json, trunk.mean_state(batches).tolist()))
        device = next(trunk.module.parameters()).device
        return torch.tensor(cast("list[float]", found), device=device)

    def save(
        self, number: int, state: Callable[[], dict[str, Tensor]], history: list[dict[str, Json]]
    ) -> None:
        """Write a checkpoint where one is due; nothing outside of a stored step."""
        now = time.monotonic()
        least = max(engine.CHECKPOINT_SECONDS, self._cost / engine.CHECKPOINT_SHARE)
        if current().stored and now - self._saved > least:
            self.checkpoints.write(number, state(), history)
            self._saved = time.monotonic()
            self._cost = self._saved - now


class Loop:
    """Runs recovery steps and measures the task at checkpoints.

    Args:
        repair: the model under repair.
        harm_D: mean state of the trusted model on the prompts to refuse.
        loss: of hidden states [B, D] against a direction [D].
        refuse: batches of token ids of prompts to refuse.
        task: batches of token ids of task prompts.
        value: measures the task on the model under repair; told under which name to note it.
        notes: of this recovery.
    """

    def __init__(
        self,
        repair: Restorer,
        harm_D: Tensor,
        loss: Callable[[Tensor, Tensor], Tensor],
        *,
        refuse: Sequence[Batch],
        task: Sequence[Batch],
        value: Callable[[str], float],
        notes: Notes,
    ) -> None:
        self.repair, self.refuse, self.task, self.notes = repair, refuse, task, notes
        self.harm = partial(_flip, loss, harm_D)
        self.benign = partial(_flip, loss, notes.direction("benign", repair.trunk, task))
        self._value = value
        self.start = self.value("start")
        self.best: tuple[float, Places] | None = None
        self.history: list[dict[str, Json]] = []

    def value(self, name: str) -> float:
        """The task's value now, noted under this name."""
        return float(cast(float, self.notes.once(name, lambda: self._value(name))))

    def _metric(self, **facts: Json) -> None:
        self.history.append(facts)
        current().metric(**facts)

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
        self._metric(
            step=number,
            # Raw means share a large component, so that cos starts near 1: 1 - cos is read.
            distance=1.0 + loss,
            restored=_count(restored),
            given_back=_count(returned),
            rollback=back is not None,
        )

    def measure(self, number: int, floor: float, *, rollback: bool) -> float:
        """Task value now; the checkpoint is kept where it is the best so far.

        That is the latest whose value is at least `floor`, else the first of the largest value.
        """
        value = self.value(f"{'rollback' if rollback else 'plain'}-{number}")
        places = self.repair.places()
        if value >= floor or self.best is None or self.best[0] < min(floor, value):
            self.best = value, places
        share = sum(map(len, places.values())) / self.repair.total
        self._metric(step=number, task=value, task_before=self.start, changed_share=share)
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
    ) -> Places:
        """Flat places to restore, by name: those of the chosen checkpoint."""
        floor = self.start * (1.0 - drop)
        number, rollback = self._resumed()
        while True:
            if number == warmup and not rollback:
                if self.measure(number, floor, rollback=False) < floor:
                    self.repair.restart()
                    self.best, number, rollback = None, 0, True
            elif number and (number % save_every == 0 or number == steps):
                self.measure(number, floor, rollback=rollback)
            if number == steps:
                return self.best[1] if self.best else {}
            number += 1
            self.step(number, rate, rollback_rate if rollback else None, accumulate)
            done = number + warmup * rollback  # in rollback mode the warm-up lies behind
            state = partial(self._state, number, rollback, accumulate and not rollback)
            self.notes.save(done, state, self.history)
            current().progress(number, steps, "restoring weights")

    def _state(self, number: int, rollback: bool, grads: bool) -> dict[str, Tensor]:
        value, best = self.best or (0.0, {})
        found = {
            "at": torch.tensor([number, rollback, self.best is not None]),
            "value": torch.tensor(value, dtype=torch.float64),
        }
        parts = {"best": best, "place": self.repair.places()}
        if grads:
            weights = self.repair.weights
            parts["grad"] = {n: w.grad for n, w in weights.items() if w.grad is not None}
        return found | {f"{part}/{n}": t for part, named in parts.items() for n, t in named.items()}

    def _resumed(self) -> tuple[int, bool]:
        """Steps done in the present mode, and whether that is rollback, by the last checkpoint."""
        kept = self.notes.checkpoints.last()
        if kept is None:
            return 0, False
        number, rollback, has_best = kept.tensors["at"].tolist()
        parts: dict[str, Places] = {"best": {}, "place": {}, "grad": {}}
        for name, tensor in kept.tensors.items():
            part, slash, name = name.partition("/")
            if slash:
                parts[part][name] = tensor
        if has_best:
            self.best = float(kept.tensors["value"]), parts["best"]
        _take_up(self.repair, parts["place"], parts["grad"])
        for facts in kept.history:
            self._metric(**facts)
        return int(number), bool(rollback)


def _take_up(repair: Restorer, places: Places, grads: Mapping[str, Tensor]) -> None:
    """Restore just these places, and go on from these sums of gradients."""
    repair.restart()
    with torch.no_grad():
        for name, at in places.items():
            weight = repair.weights[name]
            mask = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
            mask[at.to(weight.device)] = True
            weight.copy_(torch.where(mask.view_as(weight), repair.trusted[name], weight))
    for name, grad in grads.items():
        repair.weights[name].grad = grad.to(repair.weights[name].device)


def _flip(
    loss: Callable[[Tensor, Tensor], Tensor], direction_D: Tensor, states_BD: Tensor
) -> Tensor:
    return loss(states_BD, direction_D)

"""Losses on given rows beside an online method's own: what its setting `mix` does.

    L = w_0 L_0 + sum_i w_i L_i      L_0: the method's loss of the answers of an update
                                     L_i: mean of objective i over its own weights in its rows

It is the `mix` of objectives (`core.trainer.mix`), added to nothing on the rows of the input
`mix_data`, or of `data` where those have answers: supervised and preference losses, several of them
on the same rows. Each update of the policy takes the next ceil(batch / minibatches) rows of
permutations laid end to end, which seed and update alone decide. They are differentiated apart from
the answers, at temperature 1. Where a rollout teaches nothing, or has no group left, they are
learnt alone; while the critic learns alone there is none of them, and w_0 is 1.

With {sft: w} on text of its own it is the PPO-ptx of "Training language models to follow
instructions with human feedback", arXiv 2203.02155.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

from truing.catalogue import training
from truing.context import Context, Json, current
from truing.core.batch.parts import Part
from truing.core.batch.reading import read_units
from truing.core.batch.row_kinds import takes_texts
from truing.core.batch.training_rows import Unit
from truing.core.chat import receipt
from truing.core.engine import Order
from truing.core.objective import Loss, Measurements, Objective, objective_of
from truing.core.passes.precision import type_of
from truing.core.reference import Reference
from truing.core.trainer import distributed
from truing.core.trainer.mix import Mixture, check_terms, lasting, mixed
from truing.core.trainer.preflight import check_rows, check_term
from truing.core.trainer.text_task import TextTask
from truing.core.training import Hook, State
from truing.errors import InputError
from truing.method import methods
from truing.readings import READINGS
from truing.tables import Table

if TYPE_CHECKING:
    from torch import nn

    from truing.core.modelfiles.lora import Lora
    from truing.core.online_training import OnlineTraining
    from truing.core.trainer.start import Start
    from truing.core.tree import Node

INPUT = "mix_data"
MIX = (
    "losses on given rows that are added to the method's own, by weight: {sft: 0.5} or {dpo: "
    "{weight: 0.2, beta: 0.05}}; its own weighs 1 unless it is named, too."
)
ROWS = "rows of the losses in `mix`: examples, texts, pairs, ...; without it those of `data`."
READ = {given: kind for given, kind in READINGS if kind != "prompt"} | {"text": "example"}
Mix = Mapping[str, object]


def nothing(m: Measurements) -> Loss:
    """The loss that others are added to."""
    return Loss(m.mask_UKT.new_zeros(len(m.mask_UKT)))


def added(name: str, mix: Mix, kind: str) -> Mixture:
    """The losses of `mix` as one objective.

    Args:
        name: of the online method, whose own weight `mix` may say.
        mix: see `core.trainer.mix.mixed`.
        kind: of the table. Losses that all train on one kind of rows train on it as it is; several
            see these rows as the `mix` of an objective on them does.
    Raises:
        InputError: what `mixed` raises.
    """
    kinds: set[str] = set()
    for other in mix:
        with contextlib.suppress(InputError):  # which `mixed` says better
            kinds.add(objective_of(methods[training(other).id].declared).rows)
    rows = kinds.pop() if len(kinds) == 1 else READ.get(kind, kind)
    return cast(Mixture, mixed(Objective(name, nothing, "token", (), rows, {}), mix))


def check_mix(name: str, settings: Mapping[str, object], table: Table | None, given: bool) -> None:
    """Raise an InputError for a `mix` or rows of it that training would refuse.

    Args:
        name: of the online method.
        settings: all of them, by name.
        table: the rows; None where they are not known yet.
        given: whether they are the input `mix_data`.
    """
    mix = cast("Mix | None", settings.get("mix"))
    if mix is None:
        if given:
            raise InputError(
                f"setting 'mix' is not given, so that {INPUT} counts for nothing",
                where=name,
                fix="Say which losses train on it, such as mix: {sft: 1}",
            )
        return
    spec = added(name, mix, table.kind if table is not None else "pair")
    check_terms(spec, check_term)
    if "mismatched" in spec.needs and rows_of(settings) < 2:
        raise InputError(
            "setting 'mix': answers are compared with those of other rows, and an update has one",
            where=name,
            fix="Raise batch, or lower minibatches",
        )
    if table is not None:
        needed = [n for n, default in {**spec.columns, **spec.texts}.items() if default is None]
        where = f"{name} {INPUT}" if given else f"{name} setting 'mix'"
        check_rows(table, spec.rows, where, needed, texts=takes_texts(spec))


def rows_of(settings: Mapping[str, object]) -> int:
    """Rows of one update, by the settings of the method."""
    batch, parts = (cast(int, settings.get(n, 1)) for n in ("batch", "minibatches"))
    return math.ceil(batch / parts)


@dataclass
class Added:
    """The losses of `mix`, their rows, and their share in each update.

    Args:
        spec: the losses as one objective.
        units: the rows as token branches.
        rows: of an update.
        notes: what to say of them.
        task: what computes them, once the model is there (`begin`).
    """

    spec: Mixture
    units: Sequence[Unit]
    rows: int
    notes: Mapping[str, Json]
    task: TextTask | None = None

    def __post_init__(self) -> None:
        # Permutations of its own: a table of as many prompts must not go in step with it.
        self.order = Order(len(self.units), self.rows, Context(seed=current().stream("mix")))

    @property
    def trees(self) -> list[Node]:
        """The rows as trees."""
        return [unit.tree() for unit in self.units]

    def asks_frozen(self, start: Start) -> bool:
        """Whether a frozen model of its own is needed: one that was given, or the old weights."""
        if start.reference is not None:
            return self.spec.takes_reference
        return self.spec.compares_vocabulary and not start.settings.rank

    def begin(self, start: Start, updates: int) -> None:
        """Measure the reference on what these updates will see; no adapter is attached yet."""
        module = cast("nn.Module", start.loaded.module)
        frozen = start.frozen() if self.asks_frozen(start) else None
        kind = start.dtype if frozen is None else type_of(frozen)
        reference = Reference((start.reference or start.model).weights_key, kind)
        spec, own = lasting(self.spec, {}, updates)
        self.task = TextTask(spec, own, Hook(), self.units, module, reference, budget=start.budget)
        if spec.takes_reference:
            steps = [self._step(step) for step in range(updates)]
            self.task.measure_reference(module if frozen is None else frozen.module, steps)
        if frozen is not None:
            self.task.compare_with(frozen.module)

    def adapt(self, adapters: Lora | None) -> None:
        """Train these adapters with the method's own loss, in place of the module's weights."""
        if adapters is not None:
            self._begun.adapt(adapters)

    @property
    def _begun(self) -> TextTask:
        return cast(TextTask, self.task)

    def _step(self, step: int) -> list[int]:
        return self.order.step(step, (step + 1) * self.order.batch)

    def parts(self, step: int, units: float) -> Iterator[Part]:
        """This process's micro-batches of the rows of update `step`.

        Args:
            units: weight of the update's other parts, which the engine divides all of them by.
        """
        rows = self._step(step)
        scale = units / len(rows)
        for part in self._begun.parts(rows, step):
            value = part.loss if part.value is None else part.value
            seen = {**part.metrics, "mix_loss": (value.detach(), float(part.weight))}
            yield replace(
                part,
                loss=part.loss * scale,
                weight=0.0,
                value=value * scale,
                metrics=seen,
                per_row=None,
            )

    def after_step(self, step: int) -> None:
        """Take on the losses' state."""
        self._begun.after_step(step)

    def state(self) -> State:
        """What a checkpoint must hold of them."""
        return self._begun.state()

    def load_state(self, state: State) -> None:
        """Take it back."""
        self._begun.load_state(state)


def read_added(
    mix: Mix | None, table: Table, given: bool, settings: OnlineTraining, start: Start
) -> Added | None:
    """The losses of `mix` with their rows, shown as they will be learnt; None without any.

    Args:
        table: see `check_mix`, as `given`.
    """
    if mix is None:
        return None
    spec = added(start.where, mix, table.kind)
    where = f"{start.where} {INPUT}" if given else f"{start.where} setting 'mix'"
    named = replace(spec, name=where)  # what is said of the rows
    units, counts = read_units(named, start.loaded, table, start.limit, own={})
    if distributed.leads():
        shown = receipt(start.loaded.tokenizer, [units[0].tree()], 1)
        print(f"{where}: loss falls on >>>these tokens<<<:\n{shown}", file=sys.stderr)
    notes = {"mix": spec.notes(), **{f"mix_{n}": v for n, v in counts.items()}}
    return Added(spec, units, rows_of(vars(settings)), notes)

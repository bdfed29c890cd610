"""Training language models: rows become packed trees, an objective becomes steps of the engine.

What happens around the loop is here: which tokens carry loss is shown before anything is trained,
the reference is measured in one pass, the adapter or the weights become a change of the `Model`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import cast

from torch import nn

from truing.changes import Adapter
from truing.context import current
from truing.core.batch.reading import Read, read_units
from truing.core.batch.training_rows import Unit
from truing.core.engine import Order, train
from truing.core.files import new_folder
from truing.core.held_out import INPUT, Watch, watching
from truing.core.modelfiles import lora
from truing.core.modelfiles.loaded import Loaded, by_file_names
from truing.core.objective import Objective
from truing.core.passes.frozen_trunk import FrozenTrunk, attach
from truing.core.passes.headed import SCORE, holds_score
from truing.core.passes.memory import Beside
from truing.core.passes.precision import type_of
from truing.core.passes.routers import with_choices
from truing.core.passes.scoring import ScoreHead, warn_of_head
from truing.core.passes.vocab_heads import VocabHeads, new_heads
from truing.core.reference import Reference
from truing.core.together import joint
from truing.core.trainer import distributed
from truing.core.trainer.frozen_view import identity
from truing.core.trainer.held_out_rows import held_rows, told_apart
from truing.core.trainer.mix import Mixture, lasting, mixed
from truing.core.trainer.own_samples import SHOWN
from truing.core.trainer.preflight import check_heads, check_left
from truing.core.trainer.start import Start, begin
from truing.core.trainer.teacher import Teachers
from truing.core.trainer.text_task import Steps, TextTask
from truing.core.training import HOOKS, Hook, TextTraining
from truing.core.weights import replaced
from truing.datasets import licence_of
from truing.errors import InputError, unknown
from truing.models import Model
from truing.tables import Table, content_hash


@dataclass(frozen=True)
class Asked:
    """What one training is to do, whatever its models and rows.

    Args:
        spec: the objective, with those that `mix` adds to it.
        own: its settings.
        mix: as it was given.
        hooked: the hook's settings that were given.
        hook: made with them.
        settings: the engine's.
        watch: when held-out rows are measured.
    """

    spec: Objective
    own: Mapping[str, object]
    mix: Mapping[str, object] | None
    hooked: Mapping[str, object]
    hook: Hook
    settings: TextTraining
    watch: Watch

    def key(
        self,
        model: Model,
        data: Table,
        reference: Model | None,
        teachers: Mapping[str, Model],
        held_out: Table | None,
    ) -> str:
        """Hash of whatever the result depends on."""
        parts: list[object] = [self.spec.name, self.own, self.mix, self.hook.settings()]
        parts += [vars(self.settings), model.weights_key, data.key, current().seed]
        parts += [identity(reference) if reference is not None else ""]
        parts += [{r: identity(t) for r, t in teachers.items()}]
        key = content_hash(parts, 8)
        return key if held_out is None else content_hash([key, held_out.key, vars(self.watch)], 8)

    def measuring(self) -> Hook:
        """A hook of their own for rows that are measured only."""
        kind = HOOKS[self.spec.hook] if self.spec.hook else Hook
        return kind(**{**self.hooked, **kind.quiet})


def _asked(spec: Objective, values: Mapping[str, object], held_out: Table | None) -> Asked:
    """What settings ask for, checked."""
    mix = cast("Mapping[str, object] | None", values.get("mix"))
    spec = mixed(spec, mix)
    shared, watched = ({f.name for f in fields(kind)} for kind in (TextTraining, Watch))
    own = {n: p.default for n, p in spec.settings.items()}
    known = {"mix", *shared, *watched, *own}
    hooked = {n: v for n, v in values.items() if n not in known}
    if hooked and not spec.hook:
        raise unknown("setting", next(iter(hooked)), [*own, *shared, *watched], where=spec.name)
    training = TextTraining(**{n: v for n, v in values.items() if n in shared})  # type: ignore[arg-type]
    training.check(spec.name)
    watch = watching(held_out, spec.name, **{n: v for n, v in values.items() if n in watched})
    own |= {n: v for n, v in values.items() if n in own}
    hook = HOOKS[spec.hook](**hooked) if spec.hook else Hook()
    return Asked(spec, own, mix, hooked, hook, training, watch)


def find_teachers(
    spec: Objective,
    student: Loaded,
    models: Mapping[str, Model],
    own: Mapping[str, object],
    dtype: str,
) -> Teachers | None:
    """The teachers in memory; None for objectives that have none."""
    if not spec.teachers:
        return None
    top_k = int(cast(int, own.get("top_k", 1)))
    return Teachers(student, models, spec.teachers, top_k=top_k, dtype=dtype, where=spec.name)


def find_heads(loaded: Loaded, own: Mapping[str, object], seed: int) -> VocabHeads:
    """Output heads of the number and rank that the objective's settings ask for."""
    count, rank = (int(cast(int, own[n])) for n in ("objectives", "head_rank"))
    return new_heads(loaded, count, rank, seed)


def trained_model(
    model: Model,
    module: nn.Module,
    adapters: lora.Lora | None,
    folder: Path,
    data: Table,
    name: str,
) -> Model:
    """The model that training made: an adapter, or new weights where `adapters` is None.

    Adapters are taken off the module, which then refers to itself no more and leaves memory.
    """
    licence = licence_of([data])
    if adapters is not None:
        with distributed.first_alone():
            if not folder.is_dir():
                with new_folder(folder) as partial:
                    adapters.save(partial, base=model.name)
        adapters.detach()
        made = model.adding(Adapter(folder), licence=licence)
    else:
        names, state = set(model.folded()), module.state_dict()
        names -= {SCORE} if holds_score(model) else set()
        if not names <= set(state):
            state = by_file_names(module, distributed.full(state))
        held = {n: t for n, t in state.items() if n in names}
        if distributed.leads() and (missing := names - set(held)):
            raise InputError(
                "the module has not the names of its files, so its weights cannot be written",
                where=model.name,
                seen=sorted(missing)[:4],
            )
        held = distributed.full(held)
        with distributed.first_alone():
            made = replaced(model, ((n, t.cpu()) for n, t in held.items()), folder)
        made = made.with_licences([licence] if licence else [])
    with distributed.first_alone():
        made = with_choices(made, module, folder.with_name(f"{folder.name}-routers"))
    return made.called(f"{model.name}+{name}")


def _sort(spec: Objective) -> str:
    """What a head that is trained so scores; see `scoring.SORTS`."""
    if spec.hook == "reviewed":
        return "reviews"
    return "steps" if spec.rows == "steps" else "answers"


def _steps(settings: TextTraining, rows: int, groups: Sequence[int] = ()) -> Steps:
    """Rows of each update, in the order that the engine draws."""
    order, end = Order(rows, settings.batch, current(), groups), settings.end(rows)
    return [order.step(step, end) for step in range(settings.total(rows))]


def _read(asked: Asked, start: Start, data: Table, held_out: Table | None) -> Read:
    """Read rows to train on and held-out ones, each counted for itself."""
    spec, own, loaded = asked.spec, asked.own, start.loaded
    if not spec.heads and "mismatched" not in spec.needs:  # which depend on more than those rows
        asked.hook.foresee(lambda units: _steps(asked.settings, len(units)))
    units, notes = read_units(spec, loaded, data, start.limit, asked.hook, own)
    if isinstance(spec, Mixture):
        notes["mix"] = spec.notes()
    if held_out is None:
        return Read(units, None, notes)
    hook, named = asked.measuring(), replace(spec, name=f"{spec.name} {INPUT}")
    with told_apart():
        found, counts = read_units(named, loaded, held_out, start.limit, hook, own)
    held = held_rows(spec, found, hook, asked.settings.batch)
    held.warn(units, named.name)
    return Read(units, held, notes | {f"{INPUT}_{n}": v for n, v in counts.items()})


def _largest(spec: Objective, units: Sequence[Unit], hook: Hook, limit: int) -> int:
    """Tokens of the largest tree of any step.

    Answers drawn later may be as long as they can be, and so may those of other rows.
    """
    longest = max(u.tree().longest for u in units) if "mismatched" in spec.needs else 0

    def later(unit: Unit) -> int:
        if not hook.fresh:
            return max(0, longest - len(unit.prompt))
        room = min(hook.max_tokens, limit - len(unit.prompt))
        return sum(room - len(answer) for answer in unit.answers[-hook.added :])

    return max(u.tree().size + later(u) for u in units)


def _compared(spec: Objective, hook: Hook, start: Start) -> bool:
    """Whether a reference of its own is asked while training: of vocabularies, or new rows."""
    asked = spec.compares_vocabulary or (hook.fresh and spec.takes_reference)
    return asked and (start.reference is not None or not start.settings.rank)


def beside_of(spec: Objective, hook: Hook, start: Start) -> Beside:
    """What `task_of` will load: a frozen module, the reference that moves and the values in use."""
    given = spec.takes_reference and start.reference is not None
    frozen = given or _compared(spec, hook, start)
    # Whoever draws answers in between needs whole weights.
    cut = not start.settings.rank and not hook.fresh and distributed.now().size > 1
    return Beside(frozen=int(frozen), moving=2 if hook.moves_reference else 0, cut=cut)


def task_of(
    asked: Asked,
    start: Start,
    read: Read,
    taught: Teachers | None = None,
    steps: Steps | None = None,
    kind: type[TextTask] = TextTask,
) -> TextTask:
    """The task with all that it is measured and compared with, its adapters and its heads.

    Args:
        steps: rows of each update; None takes the order that the engine draws.
        kind: of the task, which follows other steps than the engine's where they are given.
    """
    loaded, settings, context = start.loaded, start.settings, current()
    units, held, hook = read.units, read.held, asked.hook
    spec, own = lasting(asked.spec, asked.own, settings.total(len(units)))
    sight = start.sight() if spec.takes_reference else None
    if sight is not None:
        sight.read(read.every)
    key = (start.reference or start.model).weights_key
    reference = Reference(key, start.computed if sight is None else type_of(sight.frozen), sight)
    head = ScoreHead.of(loaded) if "scores" in spec.needs else None
    task = kind(spec, own, hook, units, loaded.module, reference, budget=start.budget, head=head)
    if spec.heads:
        check_left(spec, own, task.groups())
    steps = _steps(settings, len(units), task.groups()) if steps is None else steps
    task.steps = steps
    # Before adapters are attached the module itself is the model as it was.
    frozen = (loaded if sight is None else sight.frozen).module
    if spec.takes_reference:
        task.measure_reference(frozen, steps)
    if spec.with_reference and held is not None:
        held.view(task).measure_reference(frozen, held.steps)
    if taught is not None:
        task.learn_from(taught, steps, held.trees if held is not None else ())
    if spec.heads:
        task.speak_with(find_heads(loaded, own, context.stream("heads") % 2**31))
    adapters = attach(loaded.module, settings, context.stream("adapter") % 2**31)
    if adapters is not None:
        task.adapt(adapters)
    if settings.layers:
        key = loaded.model.weights_key
        trunk = FrozenTrunk(loaded.module, settings.layers, key, start.computed)
        task.stand_on(trunk, steps)
        if held is not None:
            with told_apart():
                held.view(task).stand_on(trunk, held.steps)
    if _compared(spec, hook, start):
        task.compare_with((start.frozen() if sight is None else sight.frozen).module)
    _spread(task, start)
    return task


def _spread(task: TextTask, start: Start) -> None:
    """Shard weights that are all trained over the processes, or train what stands behind them."""
    masters, sharded = start.masters, beside_of(task.spec, task.hook, start).cut
    if masters is not None and sharded:
        masters.release()
    elif masters is not None:
        task.stand_behind(masters)
    if sharded:
        distributed.shard(start.loaded.module, half=masters is not None)


def made_by(task: TextTask, model: Model, data: Table, folder: Path) -> Model:
    """The model that the task has trained, with its heads."""
    if task.masters is not None:
        task.masters.release()
    made = trained_model(model, task.module, task.lora, folder, data, task.name)
    with distributed.first_alone():
        if task.vocab_heads is not None:
            made = task.vocab_heads.added_to(made, folder.with_name(f"{folder.name}-heads"))
        if task.head is not None:
            at = folder.with_name(f"{folder.name}-head")
            made = task.head.added_to(made, at, _sort(task.spec))
    return made


def trained(
    asked: Asked,
    start: Start,
    read: Read,
    data: Table,
    taught: Teachers | None = None,
    steps: Steps | None = None,
    kind: type[TextTask] = TextTask,
    *,
    ended: bool = False,
) -> Model:
    """The model that comes of rows that were read from `data`: shown and checked, then trained.

    Args:
        steps, kind: see `task_of`.
        ended: see `Start.check`.
    """
    spec, hook, settings, held = asked.spec, asked.hook, asked.settings, read.held
    start.check(
        [u.tree() for u in read.units],
        _largest(spec, read.units, hook, start.limit),
        read.notes,
        ended=ended or not spec.answers_end,
        shown=SHOWN,
        beside=beside_of(spec, hook, start),
        held=held.trees if held is not None else (),
        held_largest=_largest(spec, held.units, held.hook, start.limit) if held is not None else 0,
    )
    task = task_of(asked, start, read, taught, steps, kind)
    if task.head is None:
        warn_of_head(start.loaded, spec.name)
    watched = held.watched(task, asked.watch) if held is not None else None
    train(task, settings, key=start.run, peak=settings.peak, held=watched)
    folder = distributed.agree(current().folder) / f"{spec.name}-{start.run}"
    return made_by(task, start.model, data, folder)


@joint
def train_model(
    spec: Objective,
    model: Model,
    data: Table,
    reference: Model | None,
    values: Mapping[str, object],
    teachers: Mapping[str, Model] | None = None,
    held_out: Table | None = None,
) -> Model:
    """Train `model` on `data` by an objective.

    Args:
        spec: the objective.
        model: weight changes are folded in; run-time changes are carried on to the result.
        data: rows of the objective's kind, or of one that can be converted.
        reference: of objectives that have one; None takes the model as it is before training. Its
            prefix, rewriter and edits act, as those of teachers do (`core.trainer.frozen_view`).
        values: the objective's, its hook's and the engine's settings by name, and `mix`.
        teachers: frozen models by their role in the objective.
        held_out: rows like those of `data` that are not trained on, but measured meanwhile.
    Returns:
        the model with an adapter, or with new weights when `rank` is 0.
    Raises:
        InputError: wrong rows, settings or template; a reference with another tokenizer.
        Stopped: a loss that is not finite.
    """
    asked = _asked(spec, values, held_out)
    spec, hook, settings = asked.spec, asked.hook, asked.settings
    check_heads(spec, asked.own, data, spec.name)
    if held_out is not None:
        check_heads(spec, asked.own, held_out, f"{spec.name} {INPUT}", every=False)
    key = asked.key(model, data, reference, teachers or {}, held_out)
    start = begin(
        model,
        settings,
        spec.name,
        key=key,
        reference=reference,
        readers=teachers,
        apart=not (spec.compares_vocabulary or hook.moves_reference),
        full=True,
    )
    taught = find_teachers(spec, start.loaded, teachers or {}, asked.own, start.dtype)
    read = _read(asked, start, data, held_out)
    if taught is not None:
        taught.read(read.every)
    return trained(asked, start, read, data, taught)

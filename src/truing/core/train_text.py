"""Training language models: rows become packed trees, an objective becomes steps of the engine.

What happens around the loop is here: which tokens carry loss is shown before anything is trained,
the reference is measured in one pass, the adapter or the weights become a change of the `Model`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import cast

from torch import nn

from truing.changes import Adapter
from truing.context import Json, current
from truing.core import distributed, lora
from truing.core.chat import Prompt
from truing.core.engine import Order, train
from truing.core.files import new_folder
from truing.core.frozen_trunk import FrozenTrunk, attach
from truing.core.loaded import Loaded, by_file_names
from truing.core.measure import blank, columns_of
from truing.core.memory import Beside
from truing.core.mix import Mixture, lasting, mixed
from truing.core.objective import Objective
from truing.core.preflight import check_heads
from truing.core.reference import Reference
from truing.core.routers import with_biases
from truing.core.row_kinds import as_kind, summed, takes_texts
from truing.core.scoring import ScoreHead
from truing.core.sight import identity
from truing.core.start import Start, begin, room
from truing.core.teacher import Teachers
from truing.core.text_task import TextTask
from truing.core.together import joint
from truing.core.training import HOOKS, Hook, TextTraining
from truing.core.training_rows import Reader, Unit
from truing.core.vocab_heads import VocabHeads, new_heads
from truing.core.weights import replaced
from truing.datasets import licence_of
from truing.errors import InputError, unknown
from truing.models import Model
from truing.tables import Table, content_hash, prompt_of

ASKED = 256  # rows whose columns are looked at together


def _split(
    spec: Objective, values: Mapping[str, object]
) -> tuple[dict[str, object], Hook, TextTraining]:
    """The objective's own settings, its hook made with its, and the engine's."""
    shared = {f.name for f in fields(TextTraining)}
    own = {n: p.default for n, p in spec.settings.items()}
    engine = {n: v for n, v in values.items() if n in shared}
    rest = {n: v for n, v in values.items() if n not in shared and n not in own}
    if rest and not spec.hook:
        raise unknown("setting", next(iter(rest)), [*own, *shared], where=spec.name)
    hook = HOOKS[spec.hook](**rest) if spec.hook else Hook()
    training = TextTraining(**engine)  # type: ignore[arg-type]
    training.check(spec.name)
    return own | {n: v for n, v in values.items() if n in own}, hook, training


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
        made = with_biases(made, module, folder.with_name(f"{folder.name}-routers"))
    return made.called(f"{model.name}+{name}")


def check_columns(
    spec: Objective, own: Mapping[str, object], units: Sequence[Unit], rows: Table
) -> None:
    """Raise an InputError that names the row whose columns the loss refuses."""

    def ask(some: Sequence[Unit]) -> None:
        trees = [u.tree() for u in some]
        width = max(sum(1 for _ in tree.rows()) for tree in trees)
        spec(blank(trees, spec.needs, columns_of(some, width, list(spec.columns))), own)

    if not spec.columns or spec.unit == "batch":
        return
    for start in range(0, len(units), ASKED):
        block = units[start : start + ASKED]
        try:
            ask(block)
        except InputError:
            number = {str(r["id"]): i for i, r in enumerate(rows.rows, 1)}
            with rows.naming():
                for unit in block:
                    try:
                        ask([unit])
                    except InputError as error:
                        error.where = f"{error.where} row {number[unit.id]}"
                        raise
            raise


def read_units(
    spec: Objective,
    loaded: Loaded,
    data: Table,
    limit: int,
    hook: Hook | None = None,
    own: Mapping[str, object] | None = None,
) -> tuple[list[Unit], dict[str, Json]]:
    """What will be trained on, and what to say of how it was made.

    Args:
        own: the objective's settings, which say what its columns may hold.
    """
    rows, notes = as_kind(data, spec.rows, spec.name, texts=takes_texts(spec))
    limit = room(loaded, limit)
    reader = Reader(loaded.tokenizer, spec, limit)
    if hook is not None and type(hook).rows is not Hook.rows:
        if rows.kind == "dialogue_pair":  # answers that are written anew are single ones
            rows = rows.expect(spec.rows, where=spec.name)
        rows = hook.rows(reader.usable(rows), reader)
    units = reader.read(rows)
    check_columns(spec, own or {}, units, rows)
    if hook is not None:
        asks = any(n in rows.columns for n in ("prompt", "messages"))
        prompts = {str(r["id"]): cast(Prompt, prompt_of(r)) for r in rows if asks}
        units = hook.units(loaded, units, prompts, limit)
    counts = {n: c for n, c in sorted(reader.counts.items()) if c}
    return units, summed({"rows": len(units), **counts}, notes)


def _compared(spec: Objective, start: Start) -> bool:
    """Whether whole vocabularies are compared with a module of its own."""
    return spec.compares_vocabulary and (start.reference is not None or not start.settings.rank)


def _beside(spec: Objective, hook: Hook, start: Start) -> Beside:
    """What `_task` will load: a frozen module, the reference that moves and the values in use."""
    given = spec.takes_reference and start.reference is not None
    frozen = given or _compared(spec, start)
    return Beside(frozen=int(frozen), moving=2 if hook.moves_reference else 0)


def _task(
    spec: Objective,
    own: Mapping[str, object],
    hook: Hook,
    units: list[Unit],
    start: Start,
    taught: Teachers | None,
) -> TextTask:
    """The task with all that it is measured and compared with, its adapters and its heads."""
    loaded, settings, context = start.loaded, start.settings, current()
    sight = start.sight() if spec.takes_reference else None
    if sight is not None:
        sight.read(units)
    reference = Reference((start.reference or start.model).weights_key, start.dtype, sight)
    head = ScoreHead.of(loaded) if "scores" in spec.needs else None
    spec, own = lasting(spec, own, settings.total(len(units)))
    task = TextTask(
        spec, own, hook, units, loaded.module, reference, budget=start.budget, head=head
    )
    order = Order(len(units), settings.batch, context)
    steps = [order.step(s, settings.end(len(units))) for s in range(settings.total(len(units)))]
    if spec.takes_reference:
        # Before adapters are attached the module itself is the model as it was.
        held = loaded if sight is None else sight.frozen
        task.measure_reference(held.module, steps)
    if taught is not None:
        task.learn_from(taught, steps)
    if spec.heads:
        task.speak_with(find_heads(loaded, own, context.stream("heads") % 2**31))
    adapters = attach(loaded.module, settings, context.stream("adapter") % 2**31)
    if adapters is not None:
        task.adapt(adapters)
    if settings.layers:
        key = loaded.model.weights_key
        task.stand_on(FrozenTrunk(loaded.module, settings.layers, key, start.dtype), steps)
    if _compared(spec, start):
        task.compare_with(start.frozen().module)
    if not settings.rank and not hook.fresh:  # whoever draws answers in between needs whole weights
        distributed.shard(loaded.module)
    return task


@joint
def train_model(
    spec: Objective,
    model: Model,
    data: Table,
    reference: Model | None,
    values: Mapping[str, object],
    teachers: Mapping[str, Model] | None = None,
) -> Model:
    """Train `model` on `data` by an objective.

    Args:
        spec: the objective.
        model: weight changes are folded in; run-time changes are carried on to the result.
        data: rows of the objective's kind, or of one that can be converted.
        reference: of objectives that have one; None takes the model as it is before training. Its
            prefix, rewriter and edits act, as those of teachers do (`core.sight`).
        values: the objective's, its hook's and the engine's settings by name, and `mix`.
        teachers: frozen models by their role in the objective.
    Returns:
        the model with an adapter, or with new weights when `rank` is 0.
    Raises:
        InputError: wrong rows, settings or template; a reference with another tokenizer.
        Stopped: a loss that is not finite.
    """
    mix = cast("Mapping[str, object] | None", values.get("mix"))
    spec = mixed(spec, mix)
    own, hook, settings = _split(spec, {n: v for n, v in values.items() if n != "mix"})
    check_heads(spec, own, data)
    key = content_hash(
        [spec.name, own, mix, hook.settings(), vars(settings), model.weights_key, data.key,
         current().seed, identity(reference) if reference is not None else "",
         {r: identity(t) for r, t in (teachers or {}).items()}], 8
    )  # fmt: skip
    apart = not (spec.compares_vocabulary or hook.moves_reference)
    start = begin(model, settings, spec.name, key=key, reference=reference, apart=apart)
    taught = find_teachers(spec, start.loaded, teachers or {}, own, start.dtype)
    units, notes = read_units(spec, start.loaded, data, start.limit, hook, own)
    if taught is not None:
        taught.read(units)
    if isinstance(spec, Mixture):
        notes["mix"] = spec.notes()
    trees = [u.tree() for u in units]
    largest = max(t.size for t in trees)
    start.check(
        trees,
        largest,
        notes,
        ended=not spec.answers_end,
        shown=2,
        beside=_beside(spec, hook, start),
    )
    task = _task(spec, own, hook, units, start, taught)
    train(task, settings, key=key, peak=settings.peak)
    folder = distributed.agree(current().folder) / f"{spec.name}-{key}"
    made = trained_model(model, task.module, task.lora, folder, data, spec.name)
    with distributed.first_alone():
        if task.vocab_heads is not None:
            made = task.vocab_heads.added_to(made, folder.with_name(f"{folder.name}-heads"))
        if task.head is not None:
            sort = "steps" if spec.rows == "steps" else "answers"
            made = task.head.added_to(made, folder.with_name(f"{folder.name}-head"), sort)
    return made

"""Training language models: rows become packed trees, an objective becomes steps of the engine.

What happens around the loop is here: which tokens carry loss is shown before anything is trained,
the reference is measured in one pass, the adapter or the weights become a change of the `Model`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import cast

import torch
from torch import nn

from truing.changes import Adapter
from truing.context import Json, current
from truing.core import distributed, lora
from truing.core.chat import Prompt, check_receipt, receipt
from truing.core.engine import Order, train
from truing.core.files import new_folder
from truing.core.loaded import Loaded
from truing.core.objective import Objective
from truing.core.opening import same_tokens
from truing.core.reference import Reference
from truing.core.scoring import ScoreHead
from truing.core.teacher import Teachers
from truing.core.text_task import TextTask
from truing.core.together import joint
from truing.core.training import HOOKS, Hook, TextTraining
from truing.core.training_rows import Reader, Unit, as_kind
from truing.core.tree import BUDGET, Node
from truing.core.vocab_heads import VocabHeads, new_heads
from truing.core.weights import replaced
from truing.datasets import licence_of
from truing.doctor import memory_gib
from truing.errors import InputError, unknown
from truing.models import Model
from truing.tables import Table, content_hash

GPU_BUDGET = 16384
BYTES_PER_TOKEN = 24  # of activations, times hidden size and layers, that one training token holds


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


def _show_receipt(
    spec: Objective, loaded: Loaded, trees: list[Node], notes: dict[str, Json]
) -> None:
    """Check the mask and print which tokens carry loss; raises InputError when it is wrong."""
    module = loaded.module
    embedding = cast(nn.Embedding, cast("object", module.get_input_embeddings()))  # type: ignore[operator]
    config = getattr(module, "generation_config", None)
    stops = getattr(config, "eos_token_id", None)
    ends = [stops] if isinstance(stops, int) else list(stops or [])
    check_receipt(
        loaded.tokenizer,
        trees,
        vocab=embedding.num_embeddings,
        stops=ends,
        ended=not spec.answers_end,
        where=spec.name,
    )
    if not distributed.leads():
        return
    text = receipt(loaded.tokenizer, trees, 2)
    said = ", ".join(f"{n}: {v}" for n, v in notes.items())
    print(f"{spec.name}: {said}\nloss falls on >>>these tokens<<<:\n{text}", file=sys.stderr)
    current().metric(**notes, receipt=text)


def check_memory(module: nn.Module, settings: TextTraining, largest: int, where: str) -> None:
    """Raise before a run that this machine's memory could not hold."""
    _, free = memory_gib()
    if not free or next(module.parameters()).is_cuda:
        return
    config = module.config
    hidden = int(getattr(config, "hidden_size", 0))
    layers = int(getattr(config, "num_hidden_layers", 0))
    size = sum(p.numel() * p.element_size() for p in module.parameters())
    # A full fine-tune holds gradients and two moments; an adapter a merged copy of the weights.
    state = (1 if settings.rank else 3) * size
    activations = max(largest, settings.budget or BUDGET) * hidden * layers * BYTES_PER_TOKEN * 4
    needed = (state + activations) / 2**30
    if needed > 0.95 * free:
        raise InputError(
            f"training needs about {needed:.1f} GiB more and {free:.1f} GiB of memory are free",
            where=where,
            fix="Lower max_tokens or budget" + ("" if settings.rank else ", or train an adapter"),
        )


def _reference(
    spec: Objective, loaded: Loaded, reference: Model | None, dtype: str
) -> tuple[Reference, Loaded]:
    """The empty reference and the module that it is measured with."""
    if reference is None:
        return Reference(loaded.model.weights_key, dtype), loaded
    same_tokens({"model": loaded.model, "reference": reference}, where=spec.name)
    return Reference(reference.weights_key, dtype), reference.load_module(dtype)


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
    """The model that training made: an adapter, or new weights where `adapters` is None."""
    licence = licence_of([data])
    if adapters is not None:
        with distributed.first_alone():
            if not folder.is_dir():
                with new_folder(folder) as partial:
                    adapters.save(partial, base=model.name)
        made = model.adding(Adapter(folder), licence=licence)
    else:
        names = set(model.folded())
        held = {n: t for n, t in module.state_dict().items() if n in names}
        if missing := names - set(held):
            raise InputError(
                "the module has not the names of its files, so its weights cannot be written",
                where=model.name,
                seen=sorted(missing)[:4],
            )
        held = distributed.full(held)
        with distributed.first_alone():
            made = replaced(model, ((n, t.cpu()) for n, t in held.items()), folder)
        made = made.with_licences([licence] if licence else [])
    return made.called(f"{model.name}+{name}")


def read_units(
    spec: Objective, loaded: Loaded, data: Table, limit: int, hook: Hook | None = None
) -> tuple[list[Unit], dict[str, Json]]:
    """What will be trained on, and what to say of how it was made."""
    rows, conversion = as_kind(data, spec.rows, spec.name)
    rows = rows if hook is None else hook.rows(rows)
    context = getattr(loaded.module.config, "max_position_embeddings", None)
    limit = min(limit, int(context or limit))
    reader = Reader(loaded.tokenizer, spec, limit)
    units = reader.read(rows)
    if hook is not None:
        prompts = {str(r["id"]): cast(Prompt, r.get("prompt", r.get("messages", ""))) for r in rows}
        units = hook.units(loaded, units, prompts, limit)
    notes: dict[str, Json] = {"rows": len(units)}
    notes |= {n: c for n, c in sorted(reader.counts.items()) if c}
    if conversion:
        notes["conversion"] = conversion
    return units, notes


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
        reference: of objectives that have one; None takes the model as it is before training.
        values: the objective's, its hook's and the engine's settings by name.
        teachers: frozen models by their role in the objective.
    Returns:
        the model with an adapter, or with new weights when `rank` is 0.
    Raises:
        InputError: wrong rows, settings or template; a reference with another tokenizer.
        Stopped: a loss that is not finite.
    """
    own, hook, settings = _split(spec, values)
    context = current()
    key = content_hash(
        [spec.name, own, hook.settings(), vars(settings), model.weights_key, data.key, context.seed,
         reference.weights_key if reference is not None else "",
         {r: t.weights_key for r, t in (teachers or {}).items()}], 8
    )  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # A full fine-tune keeps its weights in float32, where small updates are not rounded away.
    short = device == "cuda" and settings.rank > 0 and torch.cuda.is_bf16_supported()
    dtype = "bfloat16" if short else "float32"
    loaded = model.load_module(dtype, device, fresh=True)
    taught = find_teachers(spec, loaded, teachers or {}, own, dtype)
    units, notes = read_units(spec, loaded, data, settings.max_tokens, hook)
    trees = [u.tree() for u in units]
    budget = settings.budget or (GPU_BUDGET if device == "cuda" else BUDGET)
    how: dict[str, Json] = {"device": device, "dtype": dtype, "budget": budget}
    _show_receipt(spec, loaded, trees, notes | how | {"threads": torch.get_num_threads()})
    check_memory(loaded.module, settings, max(t.size for t in trees), spec.name)

    frozen, held = _reference(spec, loaded, reference, dtype)
    order = Order(len(units), settings.batch, context)
    head = ScoreHead.of(loaded) if "scores" in spec.needs else None
    task = TextTask(spec, own, hook, units, loaded.module, frozen, budget=budget, head=head)
    steps = [order.step(s, settings.end(len(units))) for s in range(settings.total(len(units)))]
    if spec.takes_reference:
        task.measure_reference(held.module, steps)
    if taught is not None:
        task.learn_from(taught, steps)
    if spec.heads:
        task.speak_with(find_heads(loaded, own, context.stream("heads") % 2**31))
    if settings.rank:
        seed = context.stream("adapter") % 2**31
        task.adapt(lora.attach(loaded.module, settings.rank, settings.scale_alpha, seed=seed))
    if spec.compares_vocabulary and (reference is not None or not settings.rank):
        task.compare_with((reference or model).load_module(dtype).module)
    if not settings.rank and not hook.fresh:  # whoever draws answers in between needs whole weights
        distributed.shard(loaded.module)
    train(task, settings, key=key, peak=settings.peak)
    folder = distributed.agree(context.folder) / f"{spec.name}-{key}"
    made = trained_model(model, loaded.module, task.lora, folder, data, spec.name)
    with distributed.first_alone():
        if task.vocab_heads is not None:
            made = task.vocab_heads.added_to(made, folder.with_name(f"{folder.name}-heads"))
        if head is not None:
            made = head.added_to(made, folder.with_name(f"{folder.name}-head"))
    return made

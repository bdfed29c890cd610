"""Adapters in PEFT's folders: opened on the model that each names, and all of a model's as one.

Training a model that has an adapter leaves a second one on top of the first. Side by side the two
are one adapter on the base, s_1 B_1 A_1 + s_2 B_2 A_2 = [s_1 B_1, s_2 B_2] [A_1; A_2], which is
what other programs take.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from truing.changes import Adapter, Weights
from truing.core import files
from truing.core.modelfiles import jsonfile
from truing.core.modelfiles.bases import GENERATION, TEMPLATES, TOKENIZER_FILES, WORDS
from truing.core.modelfiles.weight_files import check_weights
from truing.core.modelfiles.written_folders import EXPORTED, exported_mark, must_be_free
from truing.core.opening import (
    CONFIG,
    HUB_NAME,
    card_text,
    lay_out,
    open_model,
    sign,
    stated_licence,
)
from truing.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from truing.models import Model

NAMED = "base_model_name_or_path"
PREFIX = "base_model.model."  # of the layers' names in a file


def opened(folder: Path) -> Model:
    """An adapter in PEFT's format on the model that it names, with the tokenizer beside it."""
    config, own = jsonfile.read(folder / CONFIG), folder.resolve()
    named = config.get(NAMED)
    if not isinstance(named, str) or not named or files.expanded(named).resolve() == own:
        raise InputError(
            "the adapter does not name its base model",
            where=str(folder / CONFIG),
            seen=named,
            fix=f"Fill in {NAMED}",
        )
    try:
        base = open_model(_base(own, named, config.get("revision")))
    except InputError as error:
        error.where = f"{folder / CONFIG} {NAMED}: {error.where}".rstrip(": ")
        raise
    model = base.adding(Adapter(folder), licence=stated_licence(folder))
    if any((folder / name).is_file() for name in (*TOKENIZER_FILES, *TEMPLATES)):
        model = replace(model, base=replace(model.local, words=folder))
    check_weights(model.folder, model.weight_changes)
    mark = exported_mark(folder) or model.quarantine
    return replace(model, quarantine=mark).called(folder.name)


def _base(own: Path, named: str, revision: object) -> str:
    """Where the base of an adapter is: as named, or as seen from its folder or those around it.

    A path in its configuration counts from where it was trained.
    """
    if files.expanded(named).is_dir():
        return named
    for place in (own, *own.parents[:2]):
        if (found := (place / named).resolve()).is_dir() and found != own:
            return str(found)
    told = revision if isinstance(revision, str) and "@" not in named else ""
    return f"{named}@{told}" if told and HUB_NAME.match(named) else named


def export(model: Model, folder: Path) -> Path:
    """See `Model.export_adapter`."""
    from truing.core.modelfiles import lora

    base, alone = model.local, _alone(model)
    must_be_free(folder, EXPORTED)
    tensors, rank, transposed = _as_one(alone)
    with files.new_folder(folder) as partial:
        if base.words is not None or base.thinking is not None or base.chosen is not None:
            own = (*WORDS, GENERATION)
            lay_out(model, partial, {n: p for n, p in base.parts().items() if n in own})
        layers = {n.removeprefix(PREFIX).rpartition(".lora_")[0] for n in tensors}
        more = {**_named(model), "fan_in_fan_out": transposed}
        lora.write(partial, tensors, rank, float(rank), layers, more)
        sign(alone, partial, card_text(alone))
    return folder


def _alone(model: Model) -> Model:
    """The model with its adapters alone, which leaves out what only training goes on from.

    Raises:
        InputError: something else changes it, or it has none.
    """
    from truing.core.modelfiles.classifier import CRITIC
    from truing.core.weights import open_weights

    adapters = [c for c in model.changes if isinstance(c, Adapter)]
    others = [
        f"{c.kind} {c.key[:12]}"
        for c in model.changes
        if c not in adapters
        and not (isinstance(c, Weights) and all(n.startswith(CRITIC) for n in open_weights(c.path)))
    ]
    if others or not adapters:
        raise InputError(
            "not all that changes the model is an adapter" if others else "there is no adapter",
            where=model.name,
            seen=others or None,
            fix="Export the whole model, or save it: Model.export, Model.save",
        )
    return model.with_changes(adapters)


def _named(model: Model) -> dict[str, str]:
    """What other programs open its base by: a name of the hub, else where it lies."""
    named = model.name.partition("+")[0]  # what training has put behind it
    if not HUB_NAME.match(named):
        return {NAMED: str(model.folder.resolve())}
    base, _, revision = named.partition("@")
    return {NAMED: base} | ({"revision": revision} if revision else {})


def _as_one(model: Model) -> tuple[dict[str, Tensor], int, bool]:
    """The tensors of its adapters as of one of scale 1, its rank, and whether PEFT transposes it.

    Layers that fewer adapters are on are filled up with zeros: some programs know one rank only.
    """
    from torch.nn.functional import pad

    from truing.core.modelfiles.patches import ADAPTER, AdapterPatch, stacked
    from truing.core.weights import open_weights

    model.folded()  # an error where one does not fit
    changes = model.weight_changes
    patches = [AdapterPatch(c.path, open_weights(c.path / ADAPTER)) for c in changes]
    sorts = {bool(patch.config.get("fan_in_fan_out")) for patch in patches}
    whole = sorted(name for patch in patches for name in patch.whole)
    if whole or len(sorts) > 1:
        raise InputError(
            "its adapters hold more than A and B of layers of one sort",
            where=model.name,
            seen=whole[:4] or "fan_in_fan_out",
            fix="Export the whole model: Model.export",
        )
    layers = {name: None for patch in patches for name in patch.modules}
    pairs = {n: stacked([p.pair(n) for p in patches if n in p.modules]) for n in layers}
    rank = max(len(a_RI) for a_RI, _ in pairs.values())
    tensors: dict[str, Tensor] = {}
    for name, (a_RI, b_OR) in pairs.items():
        missing = rank - len(a_RI)
        tensors[f"{PREFIX}{name}.lora_A.weight"] = pad(a_RI, (0, 0, 0, missing)).contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = pad(b_OR, (0, missing)).contiguous()
    return tensors, rank, sorts.pop()

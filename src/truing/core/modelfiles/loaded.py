"""A model in memory: the module with its weight changes folded in, its tokenizer, its device.

Modules are kept in a small cache by the key of their weights; their tensors are mapped from the
safetensors files (private pages: writing to them never reaches the file), so that ten models on
one base cost the memory of one.
"""

from __future__ import annotations

import contextlib
import gc
import re
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

from truing.changes import Adapter, Edits
from truing.core.batch.template import tell
from truing.core.modelfiles.bases import GENERATION, TOKENIZER_FILES, check_unchanged
from truing.core.modelfiles.stock import complete, config_of, generation_of, said, stock
from truing.errors import InputError
from truing.faults import AGAIN

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from truing.core.weights import Folded
    from truing.models import Model

KEEP = 4  # modules kept in memory for reuse, beside a panel's
LARGE = 2**-4  # GiB of weights before whose reading what nobody uses any more is collected
MARGIN = 1.25  # of a module's own bytes that a device should have free: it is to compute there, too
ALONE = re.compile(r"\.experts\.\d")  # in names of a file's experts, which are laid together
_cache: OrderedDict[tuple[str, str, str], tuple[torch.nn.Module, dict[str, torch.Tensor]]]
_cache = OrderedDict()
_tokenizers: OrderedDict[str, PreTrainedTokenizerBase] = OrderedDict()
_panel = 0  # members of the largest panel of judges
_folded: set[str] = set()  # weights_key of models whose adapters cannot stand beside the weights
_guard = threading.RLock()


@dataclass
class Loaded:
    """A `Model` ready to compute.

    `module` is in eval mode and shared by all users of the same weights: whoever changes it asks
    for `load_module(fresh=True)`. `extra` holds tensors that changes brought and the architecture
    has no place for, such as a value head.
    """

    module: torch.nn.Module
    model: Model
    device: str
    extra: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer; an InputError when the folder has none."""
        return load_tokenizer(self.model)

    @contextlib.contextmanager
    def run_time(self) -> Generator[None]:
        """Apply the model's activation edits inside the block; other threads wait until it ends."""
        from truing.core import hooks
        from truing.core.passes.attention import alone

        edits = [c for c in self.model.run_time_changes if isinstance(c, Edits)]
        with alone(self.module), hooks.applied(self.module, edits):
            yield

    def folded(self) -> Folded:
        """The state dict with weight changes folded in, by the names of the base's files."""
        return self.model.folded()


def _build(
    model: Model, dtype: str, device: str, *, beside: bool = False, packed: bool = False
) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A module and its extra tensors; without its adapters where they are to stand `beside` it.

    Args:
        packed: layers of 4 bits stay so; they are packed on `device`, and nothing else is there.
    """
    import torch

    from truing.core.modelfiles import nf4
    from truing.core.passes.headed import take_apart

    number = cast(torch.dtype, getattr(torch, dtype))
    folded = _laid(model, number, beside=beside, packed=packed)
    if model.builder:
        from truing.method import get_component

        module = cast(torch.nn.Module, get_component("builder", model.builder)())
        missing = module.load_state_dict(dict(folded), strict=False)
        complete(missing.missing_keys, missing.unexpected_keys, str(model.folder))
        return module.to(number).eval(), folded.extra
    config = config_of(model.folder)
    generation = generation_of(model.local.parts().get(GENERATION))
    if folded.untied:
        config.tie_word_embeddings = False
    state = dict(folded)
    take_apart(model, config, state, folded.extra)
    module = stock(config, state, number, str(model.folder))
    if packed:
        nf4.pack(module, folded, number, device, str(model.folder))
    if generation is not None and hasattr(module, "generation_config"):
        cast("PreTrainedModel", module).generation_config = generation
    if folded.extra:
        from truing.core.passes.routers import take_choices

        take_choices(module, folded.extra)
    return module.eval(), folded.extra


def _laid(model: Model, number: torch.dtype, *, beside: bool, packed: bool) -> Folded:
    """What a module is made of, in that type; see `_build`."""
    from truing.core.modelfiles import nf4
    from truing.core.weights import Folded

    changes = [c for c in model.weight_changes if not (beside and isinstance(c, Adapter))]
    # In the module's own type: rounded to the file's first, most of what was trained could be lost.
    folded = Folded(nf4.weights_of(model.local), changes, number)
    return Folded(nf4.blank(folded, number), changes, number) if packed else folded


def by_file_names(
    module: torch.nn.Module, state: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """A module's whole state dict under the names of its files.

    Some architectures keep several tensors of a file as one, such as the experts of a layer.
    """
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(cast("PreTrainedModel", module), dict(state))


def bytes_of(model: Model, dtype: str, *, beside: bool = False, packed: bool = False) -> int:
    """Bytes of a model's weights in memory: in the type that they are read as, not their file's."""
    import torch

    from truing.core.modelfiles import nf4

    number = cast(torch.dtype, getattr(torch, dtype))
    folded = _laid(model, number, beside=beside, packed=packed)
    return nf4.bytes_of(folded, list(folded), number.itemsize)


def _made(model: Model, dtype: str, *, beside: bool, packed: bool) -> int:
    """Bytes of the weights that are made in main memory on their way to a GPU.

    All others are mapped from their files, and copied from there one by one.
    """
    import torch

    from truing.core.modelfiles import nf4

    number = cast(torch.dtype, getattr(torch, dtype))
    folded = _laid(model, number, beside=beside, packed=packed)
    made = folded.changed | nf4.rounded_in(folded)
    made |= {n for n in folded.keys() - made if ALONE.search(n) or folded.stored_dtype(n) != number}
    return nf4.bytes_of(folded, made, number.itemsize)


def check_memory(
    model: Model,
    dtype: str,
    device: str = "cpu",
    *,
    beside: bool = False,
    packed: bool = False,
) -> None:
    """Raise before a model is read that could not fit into this machine's memory.

    Args:
        device: where it goes to; what a GPU has room for, `make_place` says.
        beside, packed: whether its adapters are to stand beside it, and 4 bits stay so.
    """
    from truing.core.trainer.distributed import neighbours
    from truing.doctor import memory_gib

    ways, several, made = {"beside": beside, "packed": packed}, neighbours(), 0.0
    needed = bytes_of(model, dtype, **ways) / 2**30
    if needed > LARGE:
        gc.collect()  # a module under an adapter refers to itself and stays until this
    if several > 1 or not device.startswith("cpu"):
        made = _made(model, dtype, **ways) / 2**30
    if not device.startswith("cpu"):
        needed = made
    total, free = memory_gib()
    if free and needed > 0.95 * free and _cache:
        _cache.clear()  # what is kept for reuse must not stand in the way of what is needed
        _, free = memory_gib()
    if free and needed > 0.95 * free:
        raise InputError(
            f"the weights need about {needed:.1f} GiB and {free:.1f} GiB of memory are free",
            where=model.name,
            fix="Use a smaller model or another machine",
        )
    # Others may have taken theirs of what is free already; what is mapped is there once for all.
    if several > 1 and several * made > 0.95 * total > 0:
        raise InputError(
            f"each process makes the weights anew, {made:.1f} GiB, and the machine has {total:.1f} "
            f"GiB of memory for {several} of them",
            where=model.name,
            fix="Start fewer processes on a machine, or use a smaller model",
        )


def spare(
    device: str,
    enough: Callable[[], bool] = lambda: False,
    but: torch.nn.Module | None = None,
) -> None:
    """Drop cached modules of a device that nobody has in hand, until it is enough.

    The longest unused go first. Those that are asked for again are read from their files.

    Args:
        but: a module that the caller has in hand; to find that out takes a collection of garbage.
    """
    with _guard:
        for key in [k for k, (m, _) in _cache.items() if k[2] == device and m is not but]:
            if enough():
                return
            held = _cache.pop(key)
            still = weakref.ref(held[0])
            extra = held[1]
            del held
            gc.collect()
            if (module := still()) is not None:
                # Somebody has it in hand: forgetting it frees nothing, and reads it a second time.
                _cache[key] = (module, extra)


def make_place(needed: int, free: Callable[[], int], device: str, where: str) -> None:
    """Drop cached modules of a device, the longest unused first, until another one fits.

    Args:
        needed: bytes of the module that is about to be moved there.
        free: says how many bytes of the device's memory can be had now.
    Raises:
        InputError: it does not fit even so.
    """
    spare(device, lambda: free() >= MARGIN * needed)
    if (left := free()) < needed:
        raise InputError(
            f"the weights need {needed / 2**30:.1f} GiB and {left / 2**30:.1f} GiB of the device's "
            "memory are free",
            where=where,
            fix="Use a smaller model, or end what else runs on the device; one that was trained or "
            "merged in float32 takes half of it once it is exported to a folder",
        )


def _moved(module: torch.nn.Module, device: str, where: str) -> torch.nn.Module:
    """The module on its device, for which room is made where that is an accelerator."""
    import torch

    from truing.core.passes.attention import on_device

    if torch.device(device).type == "cuda":
        tensors = [*module.parameters(), *module.buffers()]
        size = sum(t.numel() * t.element_size() for t in tensors)
        make_place(size, lambda: free_on(device), device, where)
    return on_device(module, device)


def free_on(device: str) -> int:
    """Bytes that can be had on a GPU: free ones, and those that torch keeps and does not use."""
    from torch import cuda

    unused = cuda.memory_reserved(device) - cuda.memory_allocated(device)
    return cuda.mem_get_info(device)[0] + unused


def load_module(
    model: Model,
    dtype: str = "auto",
    device: str | None = None,
    *,
    fresh: bool = False,
    packed: bool = False,
) -> Loaded:
    """See `Model.load_module`."""
    from truing.core.modelfiles import unmerged
    from truing.doctor import device_of_machine

    if dtype not in ("auto", "float32", "bfloat16", "float16", "float64"):
        raise InputError("unknown dtype", where=model.name, seen=dtype, fix="Use float32")
    device = device or device_of_machine()
    asked, told = dtype, model.weights_key in _folded
    if asked == "auto":
        from truing.core.passes import precision

        dtype = "float32" if fresh or told else precision.own(model, device)
    packed = bool(model.local.bits) and (packed or not fresh)
    half = dtype in ("bfloat16", "float16")
    beside = unmerged.adapters_of(model) if (half or packed) and not told else []
    # Folded into the same type, adapters give other values than beside it.
    key = (model.weights_key, f"{dtype} beside" if beside else dtype, device)
    with _guard:
        if not fresh and key in _cache:
            _cache.move_to_end(key)
            module, extra = _cache[key]
            return Loaded(module, model, device, extra)
        check_unchanged(model.local)
        check_memory(model, dtype, device, beside=bool(beside), packed=packed)
        if packed and device.startswith("cuda"):  # where it is packed, layer by layer
            needed = bytes_of(model, dtype, beside=bool(beside), packed=True)
            make_place(needed, lambda: free_on(device), device, model.name)
        module, extra = _build(model, dtype, device, beside=bool(beside), packed=packed)
        module = _moved(module, device, model.name)
        if beside and not unmerged.put(module, beside):
            del module, extra
            _folded.add(model.weights_key)
            # Folded in: in float32, or rounded, as was asked for.
            kind = "float32" if asked == "auto" else dtype
            return load_module(model, kind, device, fresh=fresh, packed=packed)
        if not fresh:
            _cache[key] = (module, extra)
            while len(_cache) > KEEP + _panel:
                _cache.popitem(last=False)
    return Loaded(module, model, device, extra)


def keep_panel(members: int) -> None:
    """Keep as many modules more: a panel asks all of its members at each of its calls."""
    global _panel
    _panel = max(_panel, members)


def forget() -> None:
    """Drop all cached modules."""
    with _guard:
        _cache.clear()
        _tokenizers.clear()


def load_tokenizer(model: Model) -> PreTrainedTokenizerBase:
    """The tokenizer of a model's base, with its chat template; cached by content."""
    from transformers import AutoTokenizer

    base = model.local
    where = str(base.words or base.path)
    with _guard:
        if base.key in _tokenizers:
            return _tokenizers[base.key]
        parts = base.parts()
        if parts.keys().isdisjoint(TOKENIZER_FILES):
            fix = "Put tokenizer.json and tokenizer_config.json beside the weights"
            raise InputError("the model has no tokenizer", where=where, fix=fix)
        try:
            with base.together() as folder:
                tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # that of tokenizers, for files of newer versions, is no other
            told, fix = _unread(error, parts)
            told = f"the tokenizer cannot be read: {told}"
            raise InputError(told, where=where, fix=fix) from None
        tokenizer.name_or_path = where
        tell(tokenizer, base.thinking)
        _tokenizers[base.key] = tokenizer
        while len(_tokenizers) > 2 * KEEP + _panel:
            _tokenizers.popitem(last=False)
        return tokenizer


def _unread(error: Exception, parts: Mapping[str, Path]) -> tuple[str, str]:
    """Why a tokenizer cannot be read, and what helps."""
    from transformers.utils import is_protobuf_available, is_sentencepiece_available

    pieces = next((n for n in parts if n.endswith(".model")), "")
    if pieces and "tokenizer.json" not in parts:
        fix = "Install them: pip install sentencepiece protobuf; or give one with tokenizer.json"
        if not (is_sentencepiece_available() and is_protobuf_available()):
            return f"{pieces} needs the packages sentencepiece and protobuf", fix
    return said(error), f"{AGAIN}; if a newer version wrote it, pip install -U tokenizers"

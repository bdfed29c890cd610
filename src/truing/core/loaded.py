"""A model in memory: the module with its weight changes folded in, its tokenizer, its device.

Modules are kept in a small cache by the key of their weights; their tensors are mapped from the
safetensors files (private pages: writing to them never reaches the file), so that ten models on
one base cost the memory of one.
"""

from __future__ import annotations

import contextlib
import gc
import math
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

from truing.changes import Adapter, Edits
from truing.core.template import tell
from truing.errors import InputError
from truing.faults import AGAIN, unreadable

if TYPE_CHECKING:
    import torch
    from transformers import (
        GenerationConfig,
        PreTrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
    )

    from truing.core.weights import Folded
    from truing.models import Model

KEEP = 4  # modules kept in memory for reuse, beside a panel's
LARGE = 2**-4  # GiB of weights before whose reading what nobody uses any more is collected
MARGIN = 1.25  # of a module's own bytes that a device should have free: it is to compute there, too
_cache: OrderedDict[tuple[str, str, str], tuple[torch.nn.Module, dict[str, torch.Tensor]]]
_cache = OrderedDict()
_tokenizers: OrderedDict[str, PreTrainedTokenizerBase] = OrderedDict()
_panel = 0  # members of the largest panel of judges
_folded: set[str] = set()  # weights_key of models whose adapters cannot stand beside the weights
_guard = threading.RLock()
# What libraries raise for files of other types than they expect.
MALFORMED = (ValueError, KeyError, TypeError, AttributeError, ArithmeticError)


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
        """Apply the model's activation edits to the module inside the block."""
        edits = [c for c in self.model.run_time_changes if isinstance(c, Edits)]
        if not edits:
            yield
            return
        from truing.core import hooks

        with hooks.applied(self.module, edits):
            yield

    def folded(self) -> Folded:
        """The state dict with weight changes folded in, by the names of the base's files."""
        return self.model.folded()


def _said(error: Exception) -> str:
    """The first line of an error; where it only announces the next, that too."""
    lines = str(error).splitlines() or [type(error).__name__]
    return " ".join(line.strip() for line in lines[: 1 + lines[0].endswith(":")])


def config_of(folder: Path) -> PreTrainedConfig:
    """The configuration of a model folder; an InputError for one that is not run."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    where = str(folder / "config.json")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, *MALFORMED, StrictDataclassError) as error:
        fix = "Architectures that bring their own code are not run"
        told = f"the configuration cannot be read: {_said(error)}"
        raise InputError(told, where=where, fix=fix) from None
    if getattr(config, "is_encoder_decoder", False):
        told = "an encoder-decoder model, which reads its prompt by other layers than it answers by"
        fix = "Give a causal language model, whose class ends in ForCausalLM"
        seen = config.architectures or config.model_type
        raise InputError(told, where=where, seen=seen, fix=fix)
    return config


def _generation(folder: Path) -> GenerationConfig | None:
    """The model's own settings of generation, where it has any."""
    from transformers import GenerationConfig

    path = folder / "generation_config.json"
    if not path.is_file():
        return None
    try:
        return GenerationConfig.from_pretrained(folder)
    except (OSError, *MALFORMED) as error:
        raise unreadable(error, "the settings of generation cannot be read", str(path)) from None


def architecture(config: PreTrainedConfig, where: str) -> type[PreTrainedModel]:
    """The class of transformers that the configuration names, else its causal language model."""
    import transformers
    from transformers import PreTrainedModel
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return cast("type[PreTrainedModel]", MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])
    seen = config.architectures or config.model_type
    fix = "Upgrade transformers: pip install -U transformers"
    raise InputError("transformers knows no such architecture", where=where, seen=seen, fix=fix)


@contextlib.contextmanager
def quiet() -> Generator[None]:
    """Switch off the progress bars and load reports of transformers inside the block."""
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def _build(
    model: Model, dtype: str, *, beside: bool = False
) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A module and its extra tensors; without its adapters where they are to stand `beside` it."""
    import torch

    from truing.core.headed import take_apart
    from truing.core.weights import Folded, open_weights

    number = cast(torch.dtype, getattr(torch, dtype))
    changes = [c for c in model.weight_changes if not (beside and isinstance(c, Adapter))]
    # In the module's own type: rounded to the file's first, most of what was trained could be lost.
    folded = Folded(open_weights(model.folder), changes, number)
    if model.builder:
        from truing.method import get_component

        module = cast(torch.nn.Module, get_component("builder", model.builder)())
        missing = module.load_state_dict(dict(folded), strict=False)
        _complete(missing.missing_keys, missing.unexpected_keys, model)
        return module.to(number).eval(), folded.extra
    config, generation = config_of(model.folder), _generation(model.folder)
    if folded.untied:
        config.tie_word_embeddings = False
    state = dict(folded)
    take_apart(model, config, state, folded.extra)
    module = _stock(model, config, state, number)
    if generation is not None and hasattr(module, "generation_config"):
        cast("PreTrainedModel", module).generation_config = generation
    if folded.extra:
        from truing.core.routers import take_choices

        take_choices(module, folded.extra)
    return module.eval(), folded.extra


def _stock(
    model: Model, config: PreTrainedConfig, state: dict[str, torch.Tensor], number: torch.dtype
) -> torch.nn.Module:
    """A module of transformers, with all of its weights."""
    where = str(model.folder)
    make = architecture(config, where)
    try:
        with quiet():
            made: object = make.from_pretrained(
                None, config=config, state_dict=state, dtype=number, output_loading_info=True
            )
    except MALFORMED as error:
        told = f"the architecture cannot be made as config.json describes it: {_said(error)}"
        raise InputError(told, where=where, seen=make.__name__, fix=AGAIN) from error
    module, facts = cast("tuple[torch.nn.Module, dict[str, object]]", made)
    _complete(facts["missing_keys"], (), model)
    return module


def by_file_names(
    module: torch.nn.Module, state: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """A module's whole state dict under the names of its files.

    Some architectures keep several tensors of a file as one, such as the experts of a layer.
    """
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(cast("PreTrainedModel", module), dict(state))


def _complete(missing: object, unexpected: object, model: Model) -> None:
    lost, odd = (sorted(cast("list[str]", names)) for names in (missing, unexpected))
    if lost or odd:
        raise InputError(
            "weights are missing" if lost else "weights do not belong to the architecture",
            where=str(model.folder),
            seen=(lost or odd)[:4],
            fix="The folder does not hold the whole model: fetch or save it again",
        )


def bytes_of(model: Model, dtype: str) -> int:
    """Bytes of a model's weights in memory: in the type that they are read as, not their file's."""
    import torch

    folded = model.folded()
    width = cast(torch.dtype, getattr(torch, dtype)).itemsize
    return width * sum(math.prod(folded.shape(n)) for n in folded)


def check_memory(model: Model, dtype: str) -> None:
    """Raise before a model is read that could not fit into this machine's memory."""
    from truing.doctor import memory_gib

    needed = bytes_of(model, dtype) / 2**30
    if needed > LARGE:
        gc.collect()  # a module under an adapter refers to itself and stays until this
    _, free = memory_gib()
    if free and needed > 0.95 * free and _cache:
        _cache.clear()  # what is kept for reuse must not stand in the way of what is needed
        _, free = memory_gib()
    if free and needed > 0.95 * free:
        raise InputError(
            f"the weights need about {needed:.1f} GiB and {free:.1f} GiB of memory are free",
            where=model.name,
            fix="Use a smaller model or another machine",
        )


def make_place(needed: int, free: Callable[[], int], device: str, where: str) -> None:
    """Drop cached modules of a device, the longest unused first, until another one fits.

    Args:
        needed: bytes of the module that is about to be moved there.
        free: says how many bytes of the device's memory can be had now.
    Raises:
        InputError: it does not fit even so.
    """
    for key in [k for k in _cache if k[2] == device]:
        if free() >= MARGIN * needed:
            return
        held = _cache.pop(key)
        still = weakref.ref(held[0])
        extra = held[1]
        del held
        gc.collect()
        if (module := still()) is not None:
            # Somebody has it in hand: forgetting it frees nothing, and reads it a second time.
            _cache[key] = (module, extra)
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

    if torch.device(device).type == "cuda":
        tensors = [*module.parameters(), *module.buffers()]
        size = sum(t.numel() * t.element_size() for t in tensors)
        make_place(size, lambda: free_on(device), device, where)
    return module.to(device)


def free_on(device: str) -> int:
    """Bytes that can be had on a GPU: free ones, and those that torch keeps and does not use."""
    from torch import cuda

    unused = cuda.memory_reserved(device) - cuda.memory_allocated(device)
    return cuda.mem_get_info(device)[0] + unused


def load_module(
    model: Model, dtype: str = "auto", device: str | None = None, *, fresh: bool = False
) -> Loaded:
    """See `Model.load_module`."""
    import torch

    from truing.core import unmerged

    if dtype not in ("auto", "float32", "bfloat16", "float16", "float64"):
        raise InputError("unknown dtype", where=model.name, seen=dtype, fix="Use float32")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    asked = dtype
    if asked == "auto":
        from truing.core import precision

        whole = fresh or model.weights_key in _folded
        dtype = "float32" if whole else precision.own(model, device)
    beside = unmerged.adapters_of(model) if dtype in ("bfloat16", "float16") else []
    # Folded into the same type, adapters give other values than beside it.
    key = (model.weights_key, f"{dtype} beside" if beside else dtype, device)
    with _guard:
        if not fresh and key in _cache:
            _cache.move_to_end(key)
            module, extra = _cache[key]
            return Loaded(module, model, device, extra)
        check_memory(model, dtype)
        module, extra = _build(model, dtype, beside=bool(beside))
        module = _moved(module, device, model.name)
        if beside and not unmerged.put(module, beside):
            del module, extra
            if asked == "auto":
                _folded.add(model.weights_key)
                return load_module(model, "float32", device)
            module, extra = _build(model, dtype)  # rounded, as was asked for
            module = _moved(module, device, model.name)
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
    """The tokenizer of a model's folder, with its chat template; cached by content."""
    from transformers import AutoTokenizer

    from truing.models import TOKENIZER_FILES

    folder = model.folder
    with _guard:
        if model.base_key in _tokenizers:
            return _tokenizers[model.base_key]
        if not any((folder / n).is_file() for n in TOKENIZER_FILES):
            fix = "Put tokenizer.json and tokenizer_config.json beside the weights"
            raise InputError("the model has no tokenizer", where=str(folder), fix=fix)
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError) as error:
            told = f"the tokenizer cannot be read: {str(error).splitlines()[0]}"
            raise InputError(told, where=str(folder), fix=AGAIN) from None
        tell(tokenizer, getattr(model.base, "thinking", None))
        _tokenizers[model.base_key] = tokenizer
        while len(_tokenizers) > 2 * KEEP + _panel:
            _tokenizers.popitem(last=False)
        return tokenizer


def need_template(tokenizer: Mapping[str, object] | object, where: str) -> None:
    """Raise unless the tokenizer has a chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            "the tokenizer has no chat template, so the model cannot be talked to",
            where=where,
            fix="Add chat_template.jinja to the model's folder, or use an instruct model",
        )

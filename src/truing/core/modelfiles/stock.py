"""Modules of transformers, as the configuration and the weights of a folder make them."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, cast

from truing.errors import InputError
from truing.faults import AGAIN, short_of_memory, unreadable

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

# What libraries raise for files of other types than they expect.
MALFORMED = (ValueError, KeyError, TypeError, AttributeError, ArithmeticError)


def said(error: Exception) -> str:
    """The first line of an error; where it only announces the next, that too."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
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
        told = f"the configuration cannot be read: {said(error)}"
        raise InputError(told, where=where, fix=fix) from None
    if getattr(config, "is_encoder_decoder", False):
        told = "an encoder-decoder model, which reads its prompt by other layers than it answers by"
        fix = "Give a causal language model, whose class ends in ForCausalLM"
        seen = config.architectures or config.model_type
        raise InputError(told, where=where, seen=seen, fix=fix)
    # A file may name kernels that are not on this machine, or code that a hub brings.
    config._attn_implementation = config._experts_implementation = None  # pyright: ignore[reportPrivateUsage]
    return config


def generation_of(path: Path | None) -> GenerationConfig | None:
    """The settings of generation in a model's generation_config.json, where it has any."""
    from transformers import GenerationConfig

    if path is None:
        return None
    try:
        return GenerationConfig.from_pretrained(path.parent)
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


def stock(
    config: PreTrainedConfig, state: dict[str, torch.Tensor], number: torch.dtype, where: str
) -> torch.nn.Module:
    """A module with all of its weights, in that type; `where` names their folder in errors."""
    make = architecture(config, where)
    try:
        with quiet():
            made: object = make.from_pretrained(
                None,
                config=config,
                state_dict=state,
                dtype=number,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are told below, by name
            )
    except ImportError as error:
        told = f"the architecture needs a package that is not installed: {said(error)}"
        raise InputError(told, where=where, seen=make.__name__, fix="Install it") from error
    except (*MALFORMED, RuntimeError) as error:
        if short_of_memory(error):
            raise
        told = f"the architecture cannot be made as config.json describes it: {said(error)}"
        raise InputError(told, where=where, seen=make.__name__, fix=AGAIN) from error
    module, facts = cast("tuple[torch.nn.Module, dict[str, Iterable[object]]]", made)
    odd = cast("Iterable[tuple[str, Iterable[int], Iterable[int]]]", facts["mismatched_keys"])
    if others := sorted(odd):
        name, size, described = others[0]
        raise InputError(
            "weights are of another size than config.json says",
            where=where,
            seen=f"{name} {tuple(size)}, by config.json {tuple(described)}",
            fix="Give the config.json that belongs to them: fetch or save the model again",
        )
    complete(facts["missing_keys"], (), where)
    return module


def complete(missing: object, unexpected: object, where: str) -> None:
    """Raise an InputError for weights that a module misses, or that it has no place for."""
    lost, odd = (sorted(cast("list[str]", names)) for names in (missing, unexpected))
    if lost or odd:
        raise InputError(
            "weights are missing" if lost else "weights do not belong to the architecture",
            where=where,
            seen=(lost or odd)[:4],
            fix="The folder does not hold the whole model: fetch or save it again",
        )

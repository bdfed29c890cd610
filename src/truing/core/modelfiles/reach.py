"""What a model's configuration says of rows: how long they may be, how wide their states are.

Models that read images as well hold the language model's configuration inside their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, cast

from truing.errors import InputError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

BEHIND_PADDING = (  # model types whose positions are counted from behind that of padding
    "camembert",
    "data2vec-text",
    "ibert",
    "longformer",
    "mpnet",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
)


def text_config(module: nn.Module) -> PreTrainedConfig:
    """The configuration of a module's language model."""
    return cast("PreTrainedModel", module).config.get_text_config()


def width_of(module: nn.Module) -> int:
    """D, numbers of a hidden state; 0 where the configuration does not say."""
    return int(cast(int, getattr(text_config(module), "hidden_size", 0)))


def context_of(module: nn.Module) -> int | None:
    """Tokens that a row may have; None where the model does not say."""
    return context_in(text_config(module))


def context_in(config: PreTrainedConfig) -> int | None:
    """The same of a configuration."""
    limit = cast("int | None", getattr(config, "max_position_embeddings", None))
    if limit is not None and getattr(config, "model_type", "") in BEHIND_PADDING:
        limit -= int(getattr(config, "pad_token_id", None) or 0) + 1
    return limit


def together_in(config: PreTrainedConfig) -> int | None:
    """Tokens that a row may have which is computed with others in one pass.

    LongRoPE (arXiv 2402.13753) has one set of factors for passes with no position beyond the length
    that was pretrained on and another for the rest, so that a longer row would change the values of
    those beside it.
    """
    limit = context_in(config)
    found = [
        int(cast(int, at))
        for kind in rope_kinds(config)
        if kind.get("rope_type") == "longrope"
        and (at := kind.get("original_max_position_embeddings") or _original(config))
    ]
    return min([*found, *([] if limit is None else [limit])], default=None)


def together_of(module: nn.Module) -> int | None:
    """The same of a module."""
    return together_in(text_config(module))


def too_long(module: nn.Module, tokens: int) -> str:
    """What is wrong with a row of so many tokens beside others; "" where nothing is."""
    limit = together_of(module)
    if limit is None or tokens <= limit:
        return ""
    if limit == context_of(module):
        return f"a row of {tokens} tokens does not fit into the model's context of {limit}"
    return (
        f"a row of {tokens} tokens is longer than the {limit} up to which LongRoPE leaves the "
        "positions of rows beside it as they are"
    )


def vocab_of(module: nn.Module) -> int:
    """Tokens that a module can read: the rows of its embeddings."""
    return cast("Callable[[], nn.Embedding]", module.get_input_embeddings)().num_embeddings


def check_ids(ids: Iterable[int], vocab: int, where: str = "") -> None:
    """Raise an InputError for a token that is none of the `vocab` ones that a model can read."""
    if (largest := max(ids, default=0)) >= vocab:
        raise InputError(
            f"the tokenizer gives ids that the model, with {vocab}, does not have",
            where=where,
            seen=largest,
            fix="Use the tokenizer that belongs to the model",
        )


def rope_kinds(config: PreTrainedConfig) -> list[dict[str, object]]:
    """What says how rotary positions are made, of each sort of layer."""
    rope = cast("dict[str, object]", getattr(config, "rope_parameters", None) or {})
    return [rope, *(v for v in rope.values() if isinstance(v, dict))]


def _original(config: PreTrainedConfig) -> object:
    return getattr(config, "original_max_position_embeddings", None)

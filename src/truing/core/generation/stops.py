"""What ends an answer: tokens of the template and of the model, and texts that a request names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

from torch import nn

from truing.core.chat import stop_ids
from truing.surrogates import UNFINISHED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from truing.core.sampling import SamplingSettings


def ends_of(tokenizer: PreTrainedTokenizerBase, module: nn.Module) -> tuple[int, ...]:
    """Token ids that end an answer where a request names none: the template's and the model's."""
    return tuple(dict.fromkeys([*stop_ids(tokenizer), *own_stops(module)]))


def own_stops(module: nn.Module) -> tuple[int, ...]:
    """Token ids at which the model's own settings end an answer."""
    for source in (getattr(module, "generation_config", None), module.config):
        found = cast("int | list[int] | None", getattr(source, "eos_token_id", None))
        if found is not None:
            return tuple(found) if isinstance(found, list) else (found,)
    return ()


def stopped_at(text: str, early: str, stops: Sequence[str]) -> int:
    """Where the first stop text stands that ends behind `early`; -1 where none does.

    Args:
        early: what `text` begins with and may be stopped by nothing in.
    """
    done = len(early.rstrip(UNFINISHED))
    places = [text.find(stop, max(0, done - len(stop) + 1)) for stop in stops]
    return min((at for at in places if at >= 0), default=-1)


def stop_place(
    text: str,
    ids: Sequence[int],
    settings: SamplingSettings,
    text_of: Callable[[Sequence[int]], str],
    done: int = 0,
) -> int:
    """Where a stop text ends an answer of the tokens `ids`, whose words are `text`; -1: nowhere.

    Args:
        text_of: words of the first tokens; asked only where there are stop texts.
        done: how many tokens the answer had before these, which count for `min_tokens`.
    """
    if not settings.stop:
        return -1
    early = text_of(ids[: max(0, settings.min_tokens - 1 - done)])
    return stopped_at(text, early, settings.stop)


def before_stop(
    text: str,
    ids: Sequence[int],
    settings: SamplingSettings,
    text_of: Callable[[Sequence[int]], str],
    done: int = 0,
) -> str:
    """`text` up to `stop_place`."""
    at = stop_place(text, ids, settings, text_of, done)
    return text[:at] if at >= 0 else text

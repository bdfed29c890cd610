"""Pieces of a text as the token ids that they have within it.

SentencePiece tokenizers (Llama 2, Mistral, Zephyr, TinyLlama) put a space before what they take for
the beginning of a text: "Hi" becomes "_Hi", but in "a\\nHi" it stays "Hi". A piece that is encoded
by itself would get a space that generation never sees. So it is encoded behind a character, whose
ids are cut off again. Byte-level tokenizers add nothing, and nothing is done for them.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

from truing.surrogates import mended

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INSIDE = "."  # stands for some text before a piece, where what it says does not matter
_ANCHORS = ("\n", ".", "a", "0")  # the first that does not merge with a piece stands before it
# A tokenizer gives each token a number of its own, which takes four times the room of its place.
_numbers: dict[int, int] = {}
_added: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, str] = weakref.WeakKeyDictionary()


def encode(
    tokenizer: PreTrainedTokenizerBase, text: str, *, before: str = "", special: bool = False
) -> list[int]:
    """Ids of a piece of text.

    Args:
        before: what stands before it; "" where it begins the whole.
        special: add the tokenizer's own beginning and end. Templates write theirs, and would
            double it.

    Half a character, of which tokenizers know nothing, is mended.
    """
    text = mended(text)
    found = _inside(tokenizer, text) if before and text and _within(tokenizer, before) else None
    if found is None:
        found = cast("list[int]", tokenizer(text, add_special_tokens=special)["input_ids"])
    return [_numbers.setdefault(i, i) for i in found]


def decode_inside(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """Text of ids that follow others, with the space that decoding takes for the beginning's."""
    anchor = encode(tokenizer, INSIDE)
    whole, head = (
        cast(str, tokenizer.decode(i, skip_special_tokens=True)) for i in ([*anchor, *ids], anchor)
    )
    return whole.removeprefix(head)


def space_added(tokenizer: PreTrainedTokenizerBase) -> str:
    """Where a tokenizer adds spaces: "" nowhere, "first" before a text, "always" where one begins.

    The latter is behind each special token, too.
    """
    if tokenizer not in _added:
        core = getattr(tokenizer, "backend_tokenizer", None)
        parts = [getattr(core, n, None) for n in ("normalizer", "pre_tokenizer")]
        found = [_scheme(json.loads(p.__getstate__())) for p in parts if p is not None]
        _added[tokenizer] = next(filter(None, found), "")
    return _added[tokenizer]


def _scheme(part: object) -> str:
    """The same of one part of a tokenizer, as its file describes it."""
    if isinstance(part, list):
        return next(filter(None, map(_scheme, cast("list[object]", part))), "")
    if not isinstance(part, Mapping):
        return ""
    told = cast("Mapping[str, object]", part)
    if told.get("type") == "Prepend":
        return "always"
    if told.get("type") == "Metaspace":
        scheme = str(told.get("prepend_scheme", "always"))
        return "" if scheme == "never" else scheme
    return _scheme([told.get(n) for n in ("normalizers", "pretokenizers")])


def _within(tokenizer: PreTrainedTokenizerBase, before: str) -> bool:
    """Whether a piece would get a space by itself that it has not got behind `before`."""
    where = space_added(tokenizer)
    if where != "always":
        return bool(where)
    return not before.endswith(tuple(str(t) for t in tokenizer.added_tokens_decoder.values()))


def _inside(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int] | None:
    """Ids of `text` behind other text; None where it merges with all that is tried."""

    def ids(text: str) -> list[int]:
        return cast("list[int]", tokenizer(text, add_special_tokens=False)["input_ids"])

    for anchor in _ANCHORS:
        head, whole = ids(anchor), ids(anchor + text)
        if whole[: len(head)] == head and tokenizer.unk_token_id not in head:
            return whole[len(head) :]
    return None

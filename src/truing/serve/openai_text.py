"""The text of tokens that come one by one, without decoding all of them again for each.

Text up to a cut is settled when nothing that follows can change it: it ends in a whole character,
and not inside a run of single bytes, which some tokenizers only write when the run is over. What
follows is decoded together with the tokens between the last two cuts, since a tokenizer may write
its first token otherwise than the same one later on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

from truing.surrogates import UNFINISHED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")  # a token that is one byte of a character


TextOf = Callable[["PreTrainedTokenizerBase", Sequence[int]], str]  # `decoded`, `answer_text`


def decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The words of tokens that begin a text; special tokens are none."""
    return cast(str, tokenizer.decode(list(ids), skip_special_tokens=True))


def joins(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer writes text piece by piece, and does not tidy up the whole of it."""
    if not tokenizer.is_fast:
        return False
    probe = "a ."
    ids = cast("list[int]", tokenizer(probe, add_special_tokens=False)["input_ids"])
    return decoded(tokenizer, ids).strip() == probe


class Growing:
    """What `text_of` says of a list that grows at its end.

    Args:
        tokenizer: whose tokens they are.
        piecewise: what `joins` says of it; without, the whole is decoded each time.
        text_of: `decoded` where the list begins a text, `answer_text` where it goes on.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, piecewise: bool, text_of: TextOf = decoded
    ) -> None:
        self._tokenizer, self._piecewise, self._text_of = tokenizer, piecewise, text_of
        self._settled = ""  # text of the tokens before the cut
        self._from = self._cut = 0  # tokens decoded from here; settled up to there
        self._shown = 0  # characters that those between the two give
        self._seen = 0
        self._text = ""

    def text(self, ids: Sequence[int]) -> str:
        """The text of `ids`, which begin with those given before."""
        if not self._piecewise:
            return self._text_of(self._tokenizer, ids)
        for end in range(self._seen + 1, len(ids) + 1):
            self._add(ids, end)
        return self._text

    def _add(self, ids: Sequence[int], end: int) -> None:
        new = self._text_of(self._tokenizer, ids[self._from : end])[self._shown :]
        self._seen, self._text = end, self._settled + new
        # Spaces alone may be left out where a text begins: what is to stand first has a letter.
        if not new.strip() or new.endswith(UNFINISHED):
            return
        if _BYTE.fullmatch(str(self._tokenizer.convert_ids_to_tokens(ids[end - 1]))):
            return
        self._settled, self._from, self._cut = self._text, self._cut, end
        self._shown = len(self._text_of(self._tokenizer, ids[self._from : end]))


def starts(
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    piecewise: bool,
    text_of: TextOf = decoded,
) -> list[int]:
    """How many characters `text_of` gives for what stands before each token."""
    growing, before = Growing(tokenizer, piecewise, text_of), list[int]()
    made: list[int] = []
    for token in ids:
        made.append(len(growing.text(before)))
        before.append(token)
    return made

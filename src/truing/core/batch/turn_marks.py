"""Texts that hold what is put around an answer anyway: such answers end twice.

Rows that another tool has put into a template train without a word. They are counted, and a
warning says so; what they hold may be meant, as in lessons on templates.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

from truing.core.batch.template import turn_of
from truing.core.trainer import distributed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COUNT = "with_turn_marks"  # what such rows are counted under


def turn_marks(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Special tokens that stand around an answer, such as "<|im_end|>"."""
    turn = turn_of(tokenizer)
    around = turn.before + turn.tail
    return [t for t in tokenizer.all_special_tokens if t and t in around]


def holds(value: object, marks: Sequence[str]) -> bool:
    """Whether a text, or one of a list of texts and messages, holds any of the marks."""
    if isinstance(value, str):
        return any(mark in value for mark in marks)
    if isinstance(value, Mapping):
        return holds(cast("Mapping[str, object]", value).get("content"), marks)
    return isinstance(value, list) and any(holds(v, marks) for v in cast("list[object]", value))


def warn(marked: int, rows: int, tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Say how many rows hold marks; nothing where none does."""
    if not marked or not distributed.leads():
        return
    known = " or ".join(map(repr, turn_marks(tokenizer)))
    puts, fix = "which is put behind an answer anyway", "give the words alone"
    if tokenizer.chat_template:
        puts = "which the template puts around them itself"
        fix += ", or whole texts in a column 'text'"
    print(
        f"{where}: warning: texts in {marked} of {rows} rows hold {known}, {puts}; {fix}",
        file=sys.stderr,
    )

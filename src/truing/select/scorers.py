"""Scorers of single turns: expected score from digit logits, length, perplexity, random.

A scorer takes rows with "prompt" and "completion" and an optional model, and returns one float per
row. `deita` multiplies two of them; other selection methods use one. Those that ask a model compute
many rows at once on packed trees, and keep finished ones in the step's journal.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor

from truing.context import current
from truing.core.batch.encoding import encode
from truing.core.chat import completion_ids, prompt_ids
from truing.core.generate import rewritten
from truing.core.journaled import kept
from truing.core.passes.scoring import by_tree, tail_logps
from truing.core.tree import group_tree
from truing.errors import InputError
from truing.method import component
from truing.models import Loaded, Model
from truing.specify.texts import words
from truing.tables import Row, user_text

DIGITS = 6  # Deita's scores are 1 to 6
UNKNOWN = 3.0  # Deita's score where a digit or the position is missing
CHUNK = 32  # rows that a kill can cost
Asked = tuple[list[int], list[list[int]]]  # ids of what is read, and of what may follow it

_ASK = {
    "complexity": "You rate the complexity of questions.\n#Question#: {prompt}\n##Complexity: ",
    "quality": (
        "You rate the quality of responses to questions.\n#Question#: {prompt}\n"
        "#Response#: {completion}\n##Quality: "
    ),
}


def expected_score_of(logits_BD: Tensor) -> Tensor:
    """Expected digit [B] from logits of the digits 1..D: sum_k k softmax(z)_k."""
    digits_D = torch.arange(1, logits_BD.shape[-1] + 1, dtype=torch.float32)
    return (torch.softmax(logits_BD.float(), dim=-1) * digits_D.to(logits_BD.device)).sum(-1)


def digit_ids(loaded: Loaded, text: str) -> list[int] | None:
    """Token ids of the digits 1..6 as they follow `text`; None when one is not a single token."""
    head = encode(loaded.tokenizer, text)
    found: list[int] = []
    for digit in range(1, DIGITS + 1):
        ids = encode(loaded.tokenizer, text + str(digit))
        if ids[: len(head)] != head or len(ids) != len(head) + 1:
            return None
        found.append(ids[-1])
    return found


def _needs_model(model: Model | None, name: str) -> Model:
    if model is None:
        raise InputError("needs a model", where=f"scorer {name}", fix="Give the step a model")
    return model


def branch_logps(loaded: Loaded, asked: Sequence[Asked], *, mean: bool = False) -> Tensor:
    """log p [N, K] of each of the K continuations of N texts, or its mean over their tokens."""
    trees = [group_tree(head, tails) for head, tails in asked]
    return torch.stack(list(by_tree(loaded, trees, tail_logps(loaded, mean=mean))))


def _read(loaded: Loaded, text: str, max_length: int) -> list[int]:
    """Ids of a text, of one too long its end, behind the start that its tokenizer gives a text."""
    bos = cast("int | None", loaded.tokenizer.bos_token_id)
    start = [i for i in encode(loaded.tokenizer, "", special=True)[:1] if i == bos]
    ids = encode(loaded.tokenizer, text)
    return [*start, *ids[max(0, len(ids) + len(start) - max_length) :]]


@component("scorer")
def expected_score(
    rows: list[Row],
    model: Model | None = None,
    *,
    of: Literal["complexity", "quality"] = "complexity",
    max_length: int = 512,
) -> list[float]:
    """Deita's expected score in [1, 6] from one forward pass: 3.0 where it cannot be read."""
    model = _needs_model(model, "expected_score")
    loaded = model.load_module()
    digits = digit_ids(loaded, _ASK[of].rpartition("\n")[2])  # the last line, alike in all rows
    if digits is None:
        current().metric(scorer="expected_score", of=of, unknown=len(rows))
        return [UNKNOWN] * len(rows)
    asked: list[Asked] = []
    for row in rows:
        facts = {"prompt": user_text(row.get("prompt")), "completion": row.get("completion", "")}
        text = _ASK[of].format_map({k: str(v) for k, v in facts.items()})
        asked.append((_read(loaded, text, max_length), [[d] for d in digits]))

    def make(chunk: Sequence[Asked]) -> list[float]:
        return expected_score_of(branch_logps(loaded, chunk)).tolist()

    return kept("expected_score", model.key, asked, CHUNK, make)


def _text(row: Row, of: str) -> str:
    return user_text(row.get("prompt")) if of == "prompt" else str(row.get("completion", ""))


@component("scorer")
def length(
    rows: list[Row],
    model: Model | None = None,
    *,
    of: Literal["prompt", "completion"] = "completion",
    most: int = 0,
) -> list[float]:
    """Number of words of the query or the answer, at most `most` (0: no limit)."""
    counts = [len(words(_text(r, of))) for r in rows]
    return [float(min(c, most) if most else c) for c in counts]


@component("scorer")
def constant(rows: list[Row], model: Model | None = None, *, value: float = 1.0) -> list[float]:
    """The same value for all rows: leaves the order to the other scorer."""
    return [value] * len(rows)


@component("scorer")
def column(rows: list[Row], model: Model | None = None, *, name: str) -> list[float]:
    """A numeric column of the row, such as a score that an earlier step wrote."""
    values: list[float] = []
    for i, row in enumerate(rows, 1):
        value = row.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise InputError(
                f"column {name!r} must hold numbers", where=f"scorer column row {i}", seen=value
            )
        values.append(float(value))
    return values


@component("scorer")
def random(rows: list[Row], model: Model | None = None, *, salt: int = 0) -> list[float]:
    """A number in [0, 1) from the row's text and `salt`: the baseline of every selection."""
    values: list[float] = []
    for row in rows:
        text = f"{salt}/{user_text(row.get('prompt'))}/{row.get('completion', '')}"
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        values.append((int.from_bytes(digest, "big") >> 11) / 2.0**53)
    return values


def _asked(loaded: Loaded, head: Sequence[int], text: str, max_length: int) -> Asked | None:
    """A text as the answer to what goes before it, or behind a start token; None for no text.

    A tokenizer without a start token leaves the text's first token unscored.
    """
    tokenizer, before = loaded.tokenizer, list(head)
    ids = completion_ids(tokenizer, text, end=False) if before else encode(tokenizer, text)
    if not before:
        start = cast("int | None", tokenizer.bos_token_id)
        before, ids = (ids[:1], ids[1:]) if start is None else ([start], ids)
    return (before, [ids[:max_length]]) if text and ids else None


@component("scorer")
def perplexity(
    rows: list[Row],
    model: Model | None = None,
    *,
    of: Literal["prompt", "completion"] = "completion",
    sign: Literal["high", "low"] = "low",
    max_length: int = 512,
) -> list[float]:
    """Perplexity of the query, or of the answer given the query; `low` returns its inverse.

    A text without a token to score gets 0, which is worse than all others either way.
    """
    model = _needs_model(model, "perplexity")
    loaded = model.load_module()
    heads: list[list[int]] = [[] for _ in rows]
    if of == "completion":
        prompts = rewritten(model, [cast(str, row.get("prompt", "")) for row in rows])
        heads = [prompt_ids(loaded.tokenizer, prompt)[-max_length:] for prompt in prompts]
    asked = [
        _asked(loaded, head, _text(row, of), max_length)
        for row, head in zip(rows, heads, strict=True)
    ]

    def make(chunk: Sequence[Asked]) -> list[float]:
        return (-branch_logps(loaded, chunk, mean=True)[:, 0]).clamp(max=50.0).exp().tolist()

    some = [one for one in asked if one is not None]
    read = iter(kept("perplexity", model.key, some, CHUNK, make))
    values = [0.0 if one is None else next(read) for one in asked]
    return values if sign == "high" else [v and 1.0 / v for v in values]

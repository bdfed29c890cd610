"""Scorers of single turns: expected score from digit logits, length, perplexity, random.

A scorer takes rows with "prompt" and "completion" and an optional model, and returns one float per
row. `deita` multiplies two of them; other selection methods use one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor

from truing.errors import InputError
from truing.method import component
from truing.models import Loaded, Model
from truing.specify.texts import words
from truing.tables import Row, user_text

DIGITS = 6  # Deita's scores are 1 to 6
UNKNOWN = 3.0  # Deita's score where a digit or the position is missing

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
    encode = loaded.tokenizer.encode
    head = cast(list[int], encode(text, add_special_tokens=False))
    found: list[int] = []
    for digit in range(1, DIGITS + 1):
        ids = cast(list[int], encode(text + str(digit), add_special_tokens=False))
        if ids[: len(head)] != head or len(ids) != len(head) + 1:
            return None
        found.append(ids[-1])
    return found


def _needs_model(model: Model | None, name: str) -> Model:
    if model is None:
        raise InputError("needs a model", where=f"scorer {name}", fix="Give the step a model")
    return model


@component("scorer")
def expected_score(
    rows: list[Row],
    model: Model | None = None,
    *,
    of: Literal["complexity", "quality"] = "complexity",
    max_tokens: int = 512,
) -> list[float]:
    """Deita's expected score in [1, 6] from one forward pass: 3.0 where it cannot be read."""
    loaded = _needs_model(model, "expected_score").load_module()
    values: list[float] = []
    for row in rows:
        facts = {"prompt": user_text(row.get("prompt")), "completion": row.get("completion", "")}
        text = _ASK[of].format_map({k: str(v) for k, v in facts.items()})
        digits = digit_ids(loaded, text)
        ids = cast(list[int], loaded.tokenizer.encode(text, add_special_tokens=False))
        if digits is None or not ids:
            values.append(UNKNOWN)
            continue
        ids_1T = torch.tensor([ids[-max_tokens:]], device=loaded.device)
        with torch.inference_mode(), loaded.run_time():
            logits_V = loaded.module(input_ids=ids_1T).logits[0, -1]
        values.append(float(expected_score_of(logits_V[digits][None])[0]))
    return values


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


def mean_nll(loaded: Loaded, head: Sequence[int], tail: Sequence[int]) -> float:
    """Mean negative log-probability in nats of `tail` after `head`; 0 for an empty tail."""
    if not tail:
        return 0.0
    start = cast("int | None", loaded.tokenizer.bos_token_id)
    lead = list(head) or [start if start is not None else tail[0]]
    ids_1T = torch.tensor([[*lead, *tail]], device=loaded.device)
    with torch.inference_mode(), loaded.run_time():
        logits_TV = loaded.module(input_ids=ids_1T).logits[0]
    rows = logits_TV[len(lead) - 1 : -1].float()
    logp_T = torch.log_softmax(rows, dim=-1).gather(-1, ids_1T[0, len(lead) :, None])[:, 0]
    return -float(logp_T.mean())


@component("scorer")
def perplexity(
    rows: list[Row],
    model: Model | None = None,
    *,
    of: Literal["prompt", "completion"] = "completion",
    sign: Literal["high", "low"] = "low",
    max_tokens: int = 512,
) -> list[float]:
    """Perplexity of the query, or of the answer given the query; `low` returns its inverse."""
    loaded = _needs_model(model, "perplexity").load_module()
    heads: list[list[int]] = [[] for _ in rows]
    if of == "completion":
        from truing.core.chat import prompt_ids
        from truing.core.generate import rewritten

        asked = rewritten(loaded.model, [cast(str, row.get("prompt", "")) for row in rows])
        heads = [prompt_ids(loaded.tokenizer, prompt)[-max_tokens:] for prompt in asked]
    values: list[float] = []
    for row, head in zip(rows, heads, strict=True):
        encode = loaded.tokenizer.encode
        tail = cast(list[int], encode(_text(row, of), add_special_tokens=False))[:max_tokens]
        value = float(torch.tensor(mean_nll(loaded, head, tail)).clamp(max=50.0).exp())
        values.append(value if sign == "high" else 1.0 / value)
    return values

"""Steer by the difference of mean activations between answers that show a behaviour and others.

For each chosen block l, over N pairs of a chosen and a rejected answer to one prompt,

    v_l = mean_i h_l(prompt_i, chosen_i)  -  mean_i h_l(prompt_i, rejected_i)

with h_l what block l gives to the next, at the last token of the answer's words or averaged over
them. While the model writes, h_l <- h_l + s c_l v_l at every token but the first of a row, on which
attention often rests. With `unit`, v_l is scaled to length 1 and c_l is the mean length of h_l on
the answers, shared out over the chosen blocks, so that the strength s is in units of the residual
stream and means the same for every model; without it c_l = 1.

Steering Llama 2 via Contrastive Activation Addition, arXiv 2312.06681 (difference of means, every
later token); Representation Engineering, arXiv 2310.01405 (several middle blocks). Differences:
CAA reads the letter of a multiple-choice answer and steers the tokens after the prompt; here the
answer is read as written, and the prompt is steered too, since it is computed once for all answers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor

from truing.context import current
from truing.core.chat import Prompt, completion_ids, prompt_ids
from truing.core.generate import rewritten
from truing.core.hooks import Edit, capture, save
from truing.core.trunk import blocks_of
from truing.datasets import licence_of
from truing.errors import InputError
from truing.method import method
from truing.models import Edits, Model
from truing.tables import Table, content_hash

Tokens = Literal["answer", "last"]


def mean_difference_vector(positive_ND: Tensor, negative_ND: Tensor) -> Tensor:
    """Mean of one set of activations less that of the other, [D]."""
    return positive_ND.mean(0) - negative_ND.mean(0)


def middle_layers(count: int) -> tuple[int, ...]:
    """Blocks from 30 % to 45 % of the depth: where directions of behaviour are read best."""
    return tuple(range(math.floor(0.3 * count), max(math.ceil(0.45 * count), 1)))


def scaled(vector_D: Tensor, norm: float, shares: int, unit: bool) -> Tensor:
    """What strength 1 adds: the vector itself, or its share of one mean residual length."""
    if not unit:
        return vector_D
    length = float(vector_D.norm())
    if length == 0:
        return vector_D
    return vector_D * (norm / length / shares)


def _spans(
    model: Model, data: Table, prompts: Sequence[Prompt], column: str, tokens: Tokens
) -> tuple[list[list[int]], list[tuple[int, int]]]:
    tokenizer = model.load_module().tokenizer
    rows: list[list[int]] = []
    spans: list[tuple[int, int]] = []
    for i, (row, prompt) in enumerate(zip(data, prompts, strict=True)):
        head = prompt_ids(tokenizer, prompt)
        words = completion_ids(tokenizer, str(row[column]), end=False)
        if not words:
            raise InputError(f"field {column!r} is empty", where=data.place(i))
        rows.append(head + words)
        stop = len(rows[-1])
        spans.append((len(head) if tokens == "answer" else stop - 1, stop))
    return rows, spans


def asked_of(model: Model, data: Table) -> list[Prompt]:
    """The rows' prompts as the model is asked them."""
    return rewritten(model, [cast(Prompt, row["prompt"]) for row in data])


def states(
    model: Model,
    data: Table,
    column: str,
    layers: Sequence[int],
    tokens: Tokens,
    prompts: Sequence[Prompt] | None = None,
) -> dict[int, Tensor]:
    """Activations [N, D] of each block: of a row's answer on average, or of its last token.

    Args:
        prompts: what `asked_of` says, where it is known.
    """
    loaded = model.load_module()
    sites = [f"layers.{layer}.residual" for layer in layers]
    prompts = asked_of(model, data) if prompts is None else prompts
    rows, spans = _spans(model, data, prompts, column, tokens)
    with loaded.run_time():
        read = capture(loaded.module, sites, rows, spans, mean=True)
    return {layer: torch.stack(read[site]) for layer, site in zip(layers, sites, strict=True)}


def _answered(pairs: Table) -> Table:
    """The pairs both of whose answers have words, the others counted."""
    made = pairs.where(lambda row: all(str(row[n]).strip() for n in ("chosen", "rejected")))
    if not len(made):
        raise InputError(
            "no pair with two answers to compare",
            where="steer/mean_difference",
            seen=f"{len(pairs)} rows of {pairs.source}",
            fix="Give pairs whose answers have text",
        )
    if len(made) < len(pairs):
        current().metric(left_out_empty=len(pairs) - len(made))
    return made


@method(
    paper="repe-tradeoff",
    needs=("hidden", "generate"),
    rows={"data": ("pair",)},
    within={"strength": "(-inf, inf)"},  # a negative one steers away
)
def mean_difference(
    model: Model,
    data: Table,
    *,
    strength: float = 0.5,
    layers: tuple[int, ...] = (),
    tokens: Literal["answer", "last"] = "answer",
    unit: bool = True,
    skip_first: bool = True,
) -> Model:
    """Steer by the difference of mean activations between chosen and rejected answers.

    Pairs with an empty answer are left out and counted.

    Args:
        strength: of the edit, in mean lengths of the residual stream (with `unit`), shared out
            over the layers; negative steers away. With `tokens` "answer" the length is that of the
            answers' averaged states, at most the mean length of their tokens'.
        layers: blocks, counted from 0; none given takes those from 30 % to 45 % of the depth.
        tokens: read the mean over the answer's tokens, or its last token.
        unit: scale each vector to the residual stream's mean length; False takes it as it is.
        skip_first: leave the first token of each row unchanged.
    """
    data = _answered(data.expect("pair", where="steer/mean_difference"))
    count = len(blocks_of(model.load_module().module))
    chosen = layers or middle_layers(count)
    for layer in chosen:
        if not 0 <= layer < count:
            raise InputError(
                f"the model has {count} layers, counted from 0", where="layers", seen=layer
            )
    asked = asked_of(model, data)
    positive = states(model, data, "chosen", chosen, tokens, asked)
    current().progress(1, 2, "activations")
    negative = states(model, data, "rejected", chosen, tokens, asked)
    current().progress(2, 2, "activations")
    edits: list[Edit] = []
    for layer in chosen:
        vector_D = mean_difference_vector(positive[layer], negative[layer])
        norm = float(torch.cat([positive[layer], negative[layer]]).norm(dim=1).mean())
        current().metric(layer=layer, length=float(vector_D.norm()), residual=norm)
        vector_D = scaled(vector_D, norm, len(chosen), unit)
        edits.append(Edit(f"layers.{layer}.residual", vector_D, skip_first=skip_first))
    key = content_hash([model.key, data.key, list(chosen), tokens, unit, skip_first], 8)
    path = save(current().folder / f"edits-{key}.safetensors", edits)
    return model.adding(Edits(path, strength), licence=licence_of([data]))

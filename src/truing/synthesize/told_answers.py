"""A model's answers, half of them with principles in its context; kept in the step's journal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from truing.context import Json, current
from truing.core.generate import generate
from truing.errors import InputError
from truing.models import Model
from truing.principles import Principles
from truing.specify.in_context import with_principles
from truing.tables import Row, Table, as_prompt, content_hash

ROWS = 192  # answers drawn together and kept together: few are slow to draw, many lost by a kill


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    Args:
        place: where a prompt states the principles.
        told: how many of them; 0 for all.
    """

    k: int
    max_tokens: int
    temperature: float
    top_p: float
    place: Literal["user", "system"]
    told: int


def _sample(
    model: Model, chunk: Sequence[Row], principles: Principles, how: Sampling, name: str
) -> list[list[list[object]]]:
    """[prompt][answer] -> [text, finished, in context] for one chunk, half of them in context."""
    plain = [r["prompt"] for r in chunk]
    instructed: list[object] = [with_principles(p, principles, how.place, how.told) for p in plain]
    answers: list[list[list[object]]] = [[] for _ in chunk]
    k = how.k
    for prompts, n, in_context in ((plain, k - k // 2, False), (instructed, k // 2, True)):
        drawn = generate(
            model,
            prompts,
            n=n,
            max_tokens=how.max_tokens,
            temperature=how.temperature,
            top_p=how.top_p,
            seed=current().stream(f"{name}/{in_context}"),
        )
        for row, items in zip(answers, drawn, strict=True):
            row += [[c.text.strip(), c.finish == "stop", in_context] for c in items]
    return answers


def _check(prompts: Table, rows: Sequence[Row], principles: Principles, how: Sampling) -> None:
    """Raise an InputError for a prompt that cannot state principles, before anything is drawn."""
    for i, row in enumerate(rows):
        try:
            with_principles(row["prompt"], principles, how.place, how.told)
        except InputError as error:
            error.where = prompts.place(i)
            raise


def drawn_answers(
    model: Model, prompts: Table, principles: Principles, how: Sampling
) -> Iterator[tuple[Sequence[Row], list[list[list[object]]]]]:
    """Chunks of prompts with their answers, from the journal where they are there.

    Raises InputError naming the row for a prompt that cannot state principles.
    """
    context = current()
    draw = {n: getattr(how, n) for n in ("k", "max_tokens", "temperature", "top_p")}
    drawn_as = [model.key, principles.key, how.place, how.told, draw, context.seed]

    def name(start: int, chunk: Sequence[Row]) -> str:
        return f"answers/{start}/{content_hash([drawn_as, [r['prompt'] for r in chunk]], 8)}"

    def make(start: int, chunk: Sequence[Row]) -> Json:
        return cast(Json, _sample(model, chunk, principles, how, name(start, chunk)))

    rows = [as_prompt(r) for r in prompts]
    _check(prompts, rows, principles, how)
    size = max(1, 2 * ROWS // how.k)  # half of the answers to a prompt are drawn at a time
    for chunk, made in context.chunks("answers", rows, size, name, make, "answers to prompts"):
        yield chunk, cast("list[list[list[object]]]", made)

"""Steps of answers: how a text is parted, what a model says of each step, one score of all.

What whoever reads a process reward model or a value model rests on (train/reward/process_reward,
train/reward/step_value).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

from truing.core.passes.scoring import check_steps, gives_values, sigmoid, step_scores
from truing.errors import InputError
from truing.models import Model
from truing.tables import Row

Aggregate = Literal["min", "prod", "mean", "last"]


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean."""
    return math.fsum(values) / len(values)


def last(values: Sequence[float]) -> float:
    """The last step's."""
    return values[-1]


AGGREGATES: dict[str, Callable[[Sequence[float]], float]] = {
    "min": min,
    "prod": math.prod,
    "mean": mean,
    "last": last,
}


def steps_of(text: str, separator: str = "\n\n") -> list[str]:
    """The steps of an answer; what is blank between separators is none."""
    return [s for s in text.split(separator) if s.strip()]


def step_values(
    model: Model, rows: Sequence[Row], separator: str = "\n\n", *, where: str = ""
) -> list[list[float]]:
    """What a process reward model expects of each step: p_k, or what a value model says.

    Args:
        model: with a head of steps, a classifier's or a value model's.
        rows: with "prompt" and "steps", of which each has one at least.
        separator: what closes a step.
        where: what errors name.
    Raises:
        InputError: a head of whole answers or none, a row without steps, or a score that is not a
            finite number.
    """
    check_steps(model, where or model.name)
    for i, row in enumerate(rows, 1):
        if not row.get("steps"):
            raise InputError(
                "has no steps",
                where=f"{where} row {i}".strip(),
                seen=row.get("steps"),
                fix="Fill column 'steps' with the answer's steps, a list of texts",
            )
    found = step_scores(model, rows, separator)
    for i, scores in enumerate(found, 1):
        for score in scores:
            if not math.isfinite(score):
                raise InputError(
                    "the process reward model's score is not a finite number",
                    where=f"{where or model.name} row {i}",
                    seen=score,
                )
    return found if gives_values(model) else [[sigmoid(s) for s in scores] for scores in found]


def values_where_known(
    model: Model,
    rows: Sequence[Row],
    parts: Sequence[Sequence[str]],
    separator: str = "\n\n",
    *,
    where: str = "",
) -> list[list[float]]:
    """`step_values` of the rows that have steps; [] of the others, of which nothing is asked.

    Args:
        rows: with "prompt".
        parts: the steps of each, which may be none.
    """
    some = [i for i, steps in enumerate(parts) if steps]
    asked: list[Row] = [{"prompt": rows[i]["prompt"], "steps": list(parts[i])} for i in some]
    made = step_values(model, asked, separator, where=where) if asked else []
    known = dict(zip(some, made, strict=True))
    return [known.get(i, []) for i in range(len(parts))]

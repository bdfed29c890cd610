"""Reward answers by a referee: a model, such as urpo trains, that grades them side by side.

    r(x, y) = mean over `grades` gradings of the score that y gets among the answers to x, 1 to 10

The answers of a call to one prompt are graded together, in lists of at most `chunk`, each grading
in an order of its own. The referee is greedy; a list whose scores cannot be read is drawn once
more. What cannot be read then is never guessed, and nothing may be learnt from it: all answers to
that prompt get 5.5. `judged` and `unparsed` answers are recorded with each call, and where more
than a fifth of a step's, of 20 or more, cannot be read, that is an InputError.

Source: "URPO: A Unified Reward & Policy Optimization Framework for Large Language Models", arXiv
2507.17515, whose policy grades itself in this way while it is trained (train/urpo); our own prompt.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

from truing.context import current
from truing.core.bounds import check_bounds
from truing.core.judging.judge_form import shown
from truing.core.judging.referee import HIGHEST, LOWEST, graded, referee_of
from truing.errors import InputError
from truing.method import component
from truing.models import Model
from truing.naming import ModelKey
from truing.own_checks import checks
from truing.tables import Row, as_prompt, content_hash, prompt_of
from truing.train.reward.judged import check_read, judge_of

WHERE = "reward referee"


def _model(name: str) -> Model:
    """The referee that a setting names; see `judge_of`."""
    try:
        return judge_of(name)
    except InputError as error:
        error.where = f"{WHERE} setting 'model'"
        raise


def _check(settings: Mapping[str, object]) -> None:
    """What `core.judging.rewards` asks before anything is drawn."""
    check_bounds(
        settings, {"grades": (1, None), "chunk": (2, None), "max_tokens": (1, None)}, WHERE
    )
    _model(str(settings["model"]))


@component("reward")
@checks(_check)
def referee(
    rows: list[Row],
    *,
    model: ModelKey,
    criteria: str = "",
    grades: int = 1,
    chunk: int = 4,
    max_tokens: int = 256,
) -> list[float]:
    """What a referee gives each answer among those to the same prompt, from 1 to 10.

    Args:
        model: name of the referee, its address, such as http://host/v1#name, or in Python its key,
            as `truing.models.hold` gives it.
        criteria: what a good answer is; those that it was trained with.
        grades: gradings, each in an order of its own.
        chunk: most answers that are graded together.
        max_tokens: longest reply.
    """
    told = {"model": model, "grades": grades, "chunk": chunk, "max_tokens": max_tokens}
    _check(told)
    if not rows:
        return []
    judge = _model(model)
    groups: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(content_hash(prompt_of(row)), []).append(i)
    asked = [
        (shown(as_prompt(rows[at[0]])), [str(rows[i]["completion"]) for i in at])
        for at in groups.values()
    ]
    made = graded(
        asked,
        referee_of(judge, max_tokens),
        [random.Random(content_hash([key, texts])) for key, (_, texts) in zip(groups, asked)],
        grades=grades,
        chunk=chunk,
        criteria=criteria,
    )
    values = [(LOWEST + HIGHEST) / 2] * len(rows)
    unread = 0
    for at, scores in zip(groups.values(), made, strict=True):
        unread += len(at) if scores is None else 0
        for i, value in zip(at, scores or (), strict=False):
            values[i] = value
    current().metric(judge=judge.name, judged=len(rows), unparsed=unread)
    fix = "Use a referee that follows the form, such as one that urpo has trained"
    check_read(judge, "score could be read for", "answers", WHERE, fix)
    return values

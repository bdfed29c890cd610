"""A panel of judges in place of one: the mean of their verdicts, or what most of them decide.

    judge: {use: panel, judges: [tuned, smollm2-135m-instruct, http://host:8000/v1#large]}

stands wherever a method takes a judge, and as `model` of a reward that asks one. Each member judges
as it would alone; `core.judge` says how their verdicts are put together, and records how far they
agree. Replacing Judges with Juries, arXiv 2404.18796, which pools scores by their mean and choices
by vote.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, cast

from truing.core.modelfiles.panel import LEAST, panel_of
from truing.errors import InputError
from truing.method import component
from truing.models import Model
from truing.naming import ModelKey
from truing.own_checks import checks
from truing.train.reward.judged import judge_of

WHERE = "judge panel"


def _member(name: str) -> Model:
    try:
        return judge_of(name)
    except InputError as error:
        error.where = f"{WHERE} setting 'judges'"
        raise


def _check(settings: Mapping[str, object]) -> None:
    """What is asked before anything runs."""
    judges = cast("list[str]", settings["judges"])
    if len(judges) < LEAST:
        raise InputError(f"setting 'judges' needs {LEAST} at least", where=WHERE, seen=judges)


@component("judge")
@checks(_check)
def panel(*, judges: list[ModelKey], rule: Literal["mean", "majority"] = "mean") -> Model:
    """Several judges as one: the mean of their verdicts, or what more than half of them decide.

    Args:
        judges: at least two: steps, named models, folders or addresses.
        rule: "mean" of their chances or ratings; "majority" counts each as a vote, and is a tie
            where no side has more than half of them.
    """
    return panel_of([_member(name) for name in judges], rule, where=WHERE)

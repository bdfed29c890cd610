"""What a solution is rewarded by where only easy problems have answers: its steps, its outcome.

    process_shaping   min scheme   min(min_k p_k, u) - u + b
                      prod scheme  min(P_n, u) - min(1, u) + b,   P_n = p_1 ... p_n
    easy_outcome      1 or 0 by exact grading where the answer is known, 0.25 where it is not

p_k is what a process reward model says of step k, u a bound and b a bonus over all n steps. Both
are sums of the step rewards `min_rewards` and `prod_rewards` of `process_reward`, each of which
falls on what closes its step, half on each of a blank line's two newlines; methods that compare
whole answers see the sum. Without a step p is 0 and there is no bonus. `format_penalty` (in
`rules`) is the third term.
Source: "Easy-to-Hard Generalization: Scalable Alignment Beyond Human Supervision", arXiv
2403.09472.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from truing.core.judging.answer_steps import steps_of, values_where_known
from truing.core.judging.rewards import held_model
from truing.core.passes.scoring import check_logits, check_steps
from truing.core.placed import Placed, closings
from truing.evaluate.easy_to_hard import answer_of, normal
from truing.method import component
from truing.naming import ModelKey
from truing.own_checks import checks
from truing.tables import Row
from truing.train.reward.process_reward import min_rewards, prod_rewards

Scheme = Literal["min", "prod"]
SCHEMES = {"min": min_rewards, "prod": prod_rewards}
WHERE = "reward process_shaping"
BONUS = 0.25
UNKNOWN = 0.25  # reward of a problem whose answer is not known


def _check(settings: Mapping[str, object]) -> None:
    """What `core.judging.scores` asks before anything is drawn."""
    model = held_model(str(settings["model"]), WHERE)
    check_steps(model, WHERE)
    check_logits(model, WHERE)


@component("reward")
@checks(_check)
def process_shaping(
    rows: list[Row],
    *,
    model: ModelKey,
    scheme: Scheme = "min",
    bound: float = 0.5,
    bonus: float = BONUS,
    separator: str = "\n\n",
) -> list[float]:
    """A solution's step rewards, where its steps end: how far they fall below a bound, and a bonus.

    Args:
        model: name of the process reward model, or in Python its key, as `truing.models.hold`
            gives it.
        scheme: min: the worst step counts; prod: the product of all.
        bound: u, above which steps cannot gain anything.
        bonus: b, parted over the steps.
        separator: what closes a step.
    """
    found = held_model(model, WHERE)
    parts = [steps_of(str(row["completion"]), separator) for row in rows]
    known = values_where_known(found, rows, parts, separator)
    return [
        at_steps(str(row["completion"]), SCHEMES[scheme](p, bound, bonus), separator)
        if p
        else -bound
        for row, p in zip(rows, known, strict=True)
    ]


def at_steps(
    text: str, rewards: Sequence[float], separator: str, total: float | None = None
) -> Placed:
    """A reward for each step, in equal parts on the characters of the separator that closes it.

    Args:
        total: what they sum to, where that is known exactly.
    """
    places = closings(text, separator)
    return Placed(
        [(at, r / len(ends)) for r, ends in zip(rewards, places, strict=True) for at in ends],
        total,
    )


@component("reward")
def easy_outcome(
    rows: list[Row], *, column: str = "answer", unknown: float = UNKNOWN
) -> list[float]:
    """1 where a solution's answer is the right one, 0 where not, a constant where none is known.

    A solution without an answer is never right.

    Args:
        column: of the right answer; rows of hard problems have none, or an empty one.
        unknown: reward of those.
    """
    values: list[float] = []
    for row in rows:
        gold = row.get(column)
        # Where there is none, a CSV gives "" and pandas NaN.
        if gold is None or gold != gold or not str(gold).strip():
            values.append(unknown)
            continue
        said = normal(answer_of(str(row["completion"])))
        values.append(float(bool(said) and said == normal(str(gold))))
    return values

"""Reward answers by several rewards at once, less what they do not agree on.

    r(x, y) = mean_k r_k(x, y) - kappa std_k r_k(x, y)

r_k are rewards or checks of any sort, most often one reward model inferred several times, from
other seeds or other rows: `{use: ensemble, rewards: [{use: reward_model, model: a}, {use:
reward_model, model: b}]}`. A policy looks for answers that its reward is wrong about. There rewards
that were inferred apart disagree, and the lower confidence bound takes off as much. std divides by
the number of rewards; kappa = 0 is their mean. Rewards must be on one scale: models of pairs know
their scores up to a constant of the prompt, so train them with `centring`. A reward that names
several values, or pays inside of an answer, counts by its sum.

It rewards wherever a reward is named, in training, decoding, selection and evaluation, not where a
reward model is an input: several models are no one model. Models whose weights agree can be
averaged into one (merge/linear), which costs no more than one of them.

Sources: ensembles of reward models arXiv 2310.02743, which takes off the variance or takes the
worst; the standard deviation as in arXiv 2401.00243. In the list of arXiv 2507.13158.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, pstdev
from typing import cast

from truing.core.bounds import check_bounds
from truing.core.judging.scores import check_reward, total_scores
from truing.core.rl.gold import check_gold
from truing.errors import InputError
from truing.method import component
from truing.own_checks import checks
from truing.tables import Row, Table

WHERE = "reward ensemble"
LEAST = 2  # rewards that can disagree


def lower_bound(values: Sequence[float], kappa: float) -> float:
    """Mean of the values less kappa times their standard deviation."""
    return fmean(values) - kappa * pstdev(values)


def check(rewards: Sequence[Mapping[str, object]], kappa: float) -> None:
    """Raise InputError for fewer than two rewards or a kappa below 0."""
    check_bounds({"kappa": kappa}, {"kappa": (0, None)}, WHERE)
    if len(rewards) < LEAST:
        raise InputError(
            f"setting 'rewards' needs {LEAST} at least",
            where=WHERE,
            seen=[ref.get("use") for ref in rewards],
            fix="Give [{use: reward_model, model: a}, {use: reward_model, model: b}]",
        )


def _check(settings: Mapping[str, object]) -> None:
    """What `core.judging.scores` asks before anything is drawn."""
    rewards = cast("list[dict[str, object]]", settings["rewards"])
    check(rewards, float(cast(float, settings.get("kappa", 1.0))))
    for i, ref in enumerate(rewards, 1):
        check_reward(ref, where=f"{WHERE} {i}")


def _check_rows(rows: list[Row], *, rewards: list[dict[str, object]]) -> None:
    """What `core.rl.gold` asks before anything is drawn."""
    check_gold({str(i): ref for i, ref in enumerate(rewards, 1)}, Table("record", rows), WHERE)


@component("reward")
@checks(_check, rows=_check_rows)
def ensemble(
    rows: list[Row], *, rewards: list[dict[str, object]], kappa: float = 1.0
) -> list[float]:
    """The mean of several rewards less kappa times their standard deviation.

    Args:
        rewards: references to rewards or checks, such as {use: reward_model, model: a}.
        kappa: how much disagreement costs; 0 is the mean.
    """
    check(rewards, kappa)
    made = [total_scores(ref, rows, where=f"{WHERE} {i}") for i, ref in enumerate(rewards, 1)]
    return [lower_bound([values[i] for values in made], kappa) for i in range(len(rows))]

"""Do models that tell good answers from bad ones better also answer better?

    accuracy_i = mean_j [d_i(j) > 0] (ties 1/2)    d = log-ratio of chosen less that of rejected
    win_i      = win rate of run i over one fixed policy
    rho        = Spearman's rank correlation of accuracy and win rate over all runs

Each run (a checkpoint or a setting of an arm) was measured twice: by `evaluate/implicit_preference`
on the same pairs as all others, and by `evaluate/win_rate` on the same prompts, of which those
count whose verdicts could be read for all runs. Of each arm stand the means over its runs; of the
first two their differences. Offline training is known to classify pairs better than online training
and to answer worse, so that accuracy on pairs is no proxy for what a policy says: a difference in
accuracy above 0 beside one in win rate below 0 shows it. Give the reports on given pairs in one
step and those on the models' own answers (`synthesize/online_stream`, or pairs made with them) in
another. Means of the chosen answers' log-ratios stand beside, since contrastive losses let them
fall. Intervals are over pairs and over prompts, each paired between arms: Wilson's and Newcombe's
of outcomes, else bootstraps; that of rho is over the runs, too, of which it needs more than a few.
Source: hypothesis 3 of "Understanding the performance gap between online and offline alignment
algorithms", arXiv 2405.08448.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
from numpy.typing import NDArray

from truing.context import Json
from truing.core.stats import (
    bootstrap,
    paired_bootstrap,
    paired_shares,
    resampled,
    shares,
    spearman,
    wilson,
)
from truing.errors import InputError
from truing.evaluate.frontier import check_arms, wins_of
from truing.evaluate.preference import accuracy
from truing.method import method
from truing.reports import Measure, Report, check_same
from truing.tables import Row, Table

WHERE = "evaluate/discrimination"
Scores = NDArray[np.float64]
Places = NDArray[np.int64]


def told_of(preferences: Mapping[str, Report]) -> tuple[dict[str, Scores], dict[str, Scores]]:
    """By run: whether each pair is told apart (1, 1/2, 0), and the chosen answers' log-ratios.

    Raises:
        InputError: reports of other pairs, or of something else.
    """
    right: dict[str, Scores] = {}
    chosen: dict[str, Scores] = {}
    seen: list[tuple[str, str]] = []
    for name, report in preferences.items():
        rows = list(report.samples or ())
        pairs = [(str(r.get("chosen")), str(r.get("rejected"))) for r in rows]
        kind = report.meta.get("kind")
        if kind != "implicit_preference" or not pairs or pairs != (seen or pairs):
            raise InputError(
                "needs reports of evaluate/implicit_preference on the same pairs",
                where=f"{WHERE} input 'preferences' {name!r}",
                seen=(kind, len(pairs)),
            )
        seen = pairs
        w, v = ([cast(float, r[f"ratio_{n}"]) for r in rows] for n in ("chosen", "rejected"))
        right[name], chosen[name] = np.array(accuracy(w, v)), np.array(w)
    check_same(preferences, ("reference_key",), f"{WHERE} input 'preferences'")
    return right, chosen


def correlation(right: Sequence[Scores], won: Sequence[Scores]) -> float:
    """Spearman's correlation over runs of their mean accuracies and win rates."""
    return spearman([float(r.mean()) for r in right], [float(w.mean()) for w in won])


def _spread(right: Sequence[Scores], won: Sequence[Scores]) -> tuple[float, float]:
    """95 % interval of the correlation: pairs, prompts and runs are drawn anew."""

    def again(at_P: Places, at_N: Places, at_R: Places) -> float:
        return correlation([right[i][at_P] for i in at_R], [won[i][at_N] for i in at_R])

    return resampled(again, len(right[0]), len(won[0]), len(right))


def _arms(
    name: str, unit: str, better: str, by_arm: Mapping[str, Scores]
) -> tuple[list[Measure], Measure]:
    """A measure of each arm, [N] values each, and the first two arms' difference."""
    items = {arm: [float(v) for v in values_N] for arm, values_N in by_arm.items()}
    share = unit == "share"
    one, pair = (shares, paired_shares) if share else (bootstrap, paired_bootstrap)
    made = [
        Measure(f"{name} {arm}", sum(v) / len(v), *one(v), len(v), unit, "", better)
        for arm, v in items.items()
    ]
    (first, a), (second, b) = list(items.items())[:2]
    gap = made[0].value - made[1].value
    told = f"{name} {first} less {second}"
    unit = "difference of shares" if share else unit
    return made, Measure(told, gap, *pair(b, a), len(a), unit, "", "")


@method(paper="online-offline-gap")
def discrimination(
    preferences: dict[str, Report],
    win_rates: dict[str, Report],
    *,
    arms: dict[str, list[str]],
) -> Report:
    """Do models that tell good answers from bad ones better also answer better?

    Args:
        arms: names of the runs of each way of training; the first two are compared.
    """
    if set(preferences) != set(win_rates):
        odd = sorted(set(preferences) ^ set(win_rates))
        raise InputError("each run needs an accuracy and a win rate", where=WHERE, seen=odd)
    check_arms(arms, preferences, WHERE)
    right, chosen = told_of(preferences)
    won, left_out = wins_of(win_rates, WHERE)
    measures: list[Measure] = []
    for name, unit, better, found in (
        ("accuracy", "share", "higher", right),
        ("win rate", "share", "higher", won),
        ("chosen", "nats", "", chosen),
    ):
        by_arm = {arm: np.mean([found[n] for n in names], axis=0) for arm, names in arms.items()}
        each, gap = _arms(name, unit, better, by_arm)
        measures += [gap, *each]
    runs = list(dict.fromkeys(n for names in arms.values() for n in names))
    sides = [right[n] for n in runs], [won[n] for n in runs]
    rho = correlation(*sides)
    measures.append(Measure("rank correlation", rho, *_spread(*sides), len(runs), "", "", ""))
    for name in runs:
        share, n = float(right[name].mean()), len(right[name])
        ends = wilson(float(right[name].sum()), n)
        measures.append(Measure("accuracy", share, *ends, n, "share", name, "higher"))
        each = [float(v) for v in won[name]]
        rate = sum(each) / len(each)
        ends = shares(each)
        measures.append(Measure("win rate", rate, *ends, len(each), "share", name, "higher"))
    samples: list[Row] = [
        {
            "arm": arm,
            "run": n,
            "accuracy": float(right[n].mean()),
            "win_rate": float(won[n].mean()),
            "ratio_chosen": float(chosen[n].mean()),
        }
        for arm, names in arms.items()
        for n in names
    ]
    meta: dict[str, Json] = {"kind": "discrimination", "arms": [*arms]}
    meta["prompts_left_out"] = left_out
    if left_out:
        meta["notes"] = [f"prompts left out, without a verdict for every run: {left_out}"]
    return Report("accuracy on pairs and win rate", measures, Table("record", samples), meta)

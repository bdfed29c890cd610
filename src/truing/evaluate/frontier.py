"""Which way of training wins more at the same divergence: the best win rate within each budget.

    best_a(k) = win rate of the run i of arm a with KL(pi_i || start) <= k that wins most
    gap       = mean over budgets k of best_a(k) - best_b(k)

Runs are checkpoints or settings of an arm, each measured twice: by `evaluate/divergence` from the
model that all began with, and by `evaluate/win_rate` against one fixed policy on the same prompts.
Comparing at equal divergence, and frontiers rather than single runs, keeps an arm from winning by
having moved further, or less; a win rate that falls where the divergence grows is over-optimisation
and shows as a frontier that is flat ("past the peak" is what an arm's furthest run has lost from
its best). The starting model is a run of every arm that names it. Budgets for which an arm has no
run are left out, and so are prompts on which no verdict could be read for some run; both are
counted in the report.

The largest of several win rates lies too high by chance, and more so the more runs an arm has.
Hence each prompt's verdict is that of the run which wins most on the other half of the prompts
(drawn once for all): choosing among runs that are alike gains nothing. Intervals are over prompts,
paired, with the runs as they were chosen: Wilson's and Newcombe's of outcomes, else bootstraps.
Where runs are hard to choose between they are a little narrow: of independent runs that are all
alike some 91 % of them hold the gap, 0. A prompt that was asked several times counts once, by the
mean of its verdicts.
Source: the protocol of "Understanding the performance gap between online and offline alignment
algorithms", arXiv 2405.08448, whose frontiers are plain maxima.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from truing.context import Json
from truing.core.judging.reward_quality import best_elsewhere, lost_past_peak
from truing.core.stats import by_unit, mean_of, paired_shares
from truing.errors import InputError, unknown
from truing.method import method
from truing.reports import Measure, Report, check_same
from truing.tables import Row, Table

WHERE = "evaluate/frontier"
BUDGETS = (1.0, 2.0, 4.0, 8.0)
Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Run:
    """One model: how far it moved, and its verdict on each prompt, [N]."""

    name: str
    divergence: float
    won_N: Scores


def best_within(runs: Sequence[Run], budget: float) -> Scores:
    """Verdicts of the best run within the budget, as the other half of the prompts has it, [N]."""
    within = [r for r in _further(runs) if r.divergence <= budget]
    return best_elsewhere(np.stack([r.won_N for r in within], 1))


def _further(runs: Sequence[Run]) -> list[Run]:
    return sorted(runs, key=lambda r: r.divergence)


def _verdicts(report: Report) -> tuple[dict[tuple[str, int], float], int]:
    """Verdicts by prompt and how often it came before, and how many prompts were asked."""
    found: dict[tuple[str, int], float] = {}
    seen: Counter[str] = Counter()
    for row in report.samples or ():
        prompt = str(row["prompt"])
        found[prompt, seen[prompt]] = float(cast(float, row["score"]))
        seen[prompt] += 1
    return found, len(found) + len(cast("list[Json]", report.meta.get("unparsed") or []))


def wins_of(win_rates: Mapping[str, Report], where: str) -> tuple[dict[str, Scores], int]:
    """Verdict on each prompt that was judged for all runs, by run, [N]; how many others there are.

    Of a prompt that was asked several times it is the mean.

    Raises:
        InputError: reports that differ in more than the verdicts that could not be read.
    """
    check_same(win_rates, ("baseline_key", "judge", "how"), f"{where} input 'win_rates'")
    every = {name: _verdicts(report) for name, report in win_rates.items()}
    known: set[tuple[str, int]] = set()
    for name, (own, many) in every.items():
        known |= own.keys()
        if not own or len({n for _, n in every.values()}) > 1 or len(known) > many:
            raise InputError(
                "win rates must be over the same prompts",
                where=f"{where} input 'win_rates' {name!r}",
                seen=many,
                fix="Measure all runs on one table of prompts",
            )
    shared = [
        k
        for k in next(iter(every.values()), ({}, 0))[0]
        if all(k in own for own, _ in every.values())
    ]
    if every and not shared:
        raise InputError(
            "no prompt was judged for all runs",
            where=f"{where} input 'win_rates'",
            fix="Measure them again by a judge whose verdicts can be read",
        )
    prompts = [prompt for prompt, _ in shared]
    won = {
        name: np.array(by_unit([own[k] for k in shared], prompts)[0])
        for name, (own, _) in every.items()
    }
    return won, max((n for _, n in every.values()), default=0) - len(shared)


def check_arms(arms: Mapping[str, Sequence[str]], runs: Iterable[str], where: str) -> None:
    """Raise an InputError unless there are two arms or more, each of runs that are there."""
    known = list(runs)
    if len(arms) < 2 or not all(arms.values()):
        raise InputError("setting 'arms' needs two arms with a run each", where=where, seen=[*arms])
    for name in (name for names in arms.values() for name in names):
        if name not in known:
            raise unknown("run", name, known, where=f"{where} setting 'arms'")


def runs_of(
    divergences: Mapping[str, Report], win_rates: Mapping[str, Report]
) -> tuple[dict[str, Run], int]:
    """Runs by name, and the number of prompts that not all were judged on."""
    if set(divergences) != set(win_rates):
        odd = sorted(set(divergences) ^ set(win_rates))
        raise InputError("each run needs a divergence and a win rate", where=WHERE, seen=odd)
    check_same(divergences, ("reference_key",), f"{WHERE} input 'divergences'")
    won, left_out = wins_of(win_rates, WHERE)
    found = {n: Run(n, divergences[n].get("divergence").value, w_N) for n, w_N in won.items()}
    return found, left_out


@method(paper="online-offline-gap")
def frontier(
    divergences: dict[str, Report],
    win_rates: dict[str, Report],
    *,
    arms: dict[str, list[str]],
    budgets: list[float] | None = None,
) -> Report:
    """Which way of training wins more at the same divergence: the best win rate within a budget.

    Args:
        arms: names of the runs of each way of training; the first two are compared.
        budgets: of divergence, in nats; None takes 1, 2, 4 and 8.
    """
    found, unread = runs_of(divergences, win_rates)
    check_arms(arms, found, WHERE)
    chosen = {arm: [found[name] for name in names] for arm, names in arms.items()}
    least = max(min(r.divergence for r in runs) for runs in chosen.values())
    kept = [k for k in sorted(budgets or BUDGETS) if k >= least]
    if not kept:
        raise InputError(
            "no budget has a run of every arm",
            where=f"{WHERE} setting 'budgets'",
            seen=list(budgets or BUDGETS),
            fix=f"Give a larger one: from {least:.3g} nats on each arm has a run",
        )
    measures = _measures(chosen, kept)
    measures += [_past(arm, runs) for arm, runs in chosen.items()]
    samples: list[Row] = [
        {"arm": arm, "run": r.name, "divergence": r.divergence, "win_rate": float(r.won_N.mean())}
        for arm, runs in chosen.items()
        for r in _further(runs)
    ]
    left_out = [k for k in sorted(budgets or BUDGETS) if k not in kept]
    meta: dict[str, Json] = {"kind": "frontier", "arms": [*arms], "left_out": cast(Json, left_out)}
    meta["prompts_left_out"] = unread
    notes = [f"left out: {k:g} nats, within which an arm has no run" for k in left_out]
    notes += [f"prompts left out, without a verdict for every run: {unread}"] if unread else []
    meta["notes"] = cast(Json, notes)
    return Report("win rate at equal divergence", measures, Table("record", samples), meta)


def _measures(arms: Mapping[str, Sequence[Run]], budgets: Sequence[float]) -> list[Measure]:
    """The gap of the first two arms, and the win rate of each arm within each budget."""
    best = {arm: [best_within(runs, k).tolist() for k in budgets] for arm, runs in arms.items()}
    made = [
        Measure(f"win rate {arm}", *mean_of(some[i]), "share", f"{budget:g} nats", "higher")
        for i, budget in enumerate(budgets)
        for arm, some in best.items()
    ]
    (first, a_KN), (second, b_KN) = list(best.items())[:2]
    a_N, b_N = np.mean(a_KN, 0), np.mean(b_KN, 0)
    gap, ends = float((a_N - b_N).mean()), paired_shares(b_N.tolist(), a_N.tolist())
    unit = "difference of shares"
    return [Measure(f"{first} less {second}", gap, *ends, len(a_N), unit), *made]


def _past(arm: str, runs: Sequence[Run]) -> Measure:
    lost_N = lost_past_peak(np.stack([r.won_N for r in _further(runs)], 1))
    found = mean_of(lost_N.tolist(), between=None)
    return Measure(f"past the peak {arm}", *found, "share", "", "lower")

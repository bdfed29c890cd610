"""Which way of training wins more at the same divergence: the best win rate within each budget.

    best_a(k) = max { win rate of run i of arm a : KL(pi_i || start) <= k }
    gap       = mean over budgets k of best_a(k) - best_b(k)

Runs are checkpoints or settings of an arm, each measured twice: by `evaluate/divergence` from the
model that all began with, and by `evaluate/win_rate` against one fixed policy on the same prompts.
Comparing at equal divergence, and frontiers rather than single runs, keeps an arm from winning by
having moved further, or less; a win rate that falls where the divergence grows is over-optimisation
and shows as a frontier that is flat ("past the peak" is what an arm's furthest run has lost from
its best). The starting model is a run of every arm that names it. Budgets for which an arm has no
run are left out, and so are prompts on which no verdict could be read for some run; both are
counted in the report. Intervals resample prompts, paired, with the runs chosen anew in each
resample, so that what is gained by choosing the best of several is in them.
Source: the protocol of "Understanding the performance gap between online and offline alignment
algorithms", arXiv 2405.08448.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from truing.context import Json, current
from truing.errors import InputError, unknown
from truing.method import method
from truing.reports import Measure, Report
from truing.tables import Row, Table

WHERE = "evaluate/frontier"
BUDGETS = (1.0, 2.0, 4.0, 8.0)
DRAWS = 1000
Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Run:
    """One model: how far it moved, and its verdict on each prompt, [N]."""

    name: str
    divergence: float
    won_N: Scores


def best(runs: Sequence[Run], budget: float, won: Mapping[str, float]) -> float | None:
    """The largest win rate of the runs within the budget; None without any."""
    found = [won[r.name] for r in runs if r.divergence <= budget]
    return max(found) if found else None


def frontiers(
    arms: Mapping[str, Sequence[Run]], budgets: Sequence[float], picks_N: NDArray[np.int64]
) -> dict[str, list[float]]:
    """Best win rate of each arm within each budget that all can keep, over these prompts."""
    won = {r.name: float(r.won_N[picks_N].mean()) for runs in arms.values() for r in runs}
    made: dict[str, list[float]] = {name: [] for name in arms}
    for budget in budgets:
        each = {name: best(runs, budget, won) for name, runs in arms.items()}
        for name, value in each.items():
            if value is not None and None not in each.values():
                made[name].append(value)
    return made


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

    Raises:
        InputError: reports that differ in more than the verdicts that could not be read.
    """
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
    shared = [k for k in next(iter(every.values()), ({}, 0))[0]
              if all(k in own for own, _ in every.values())]  # fmt: skip
    if every and not shared:
        raise InputError(
            "no prompt was judged for all runs",
            where=f"{where} input 'win_rates'",
            fix="Measure them again by a judge whose verdicts can be read",
        )
    won = {name: np.array([own[k] for k in shared]) for name, (own, _) in every.items()}
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
) -> tuple[dict[str, Run], int, int]:
    """Runs by name, the number of prompts that all were judged on, and of others."""
    if set(divergences) != set(win_rates):
        odd = sorted(set(divergences) ^ set(win_rates))
        raise InputError("each run needs a divergence and a win rate", where=WHERE, seen=odd)
    won, left_out = wins_of(win_rates, WHERE)
    found = {n: Run(n, divergences[n].get("divergence").value, w_N) for n, w_N in won.items()}
    return found, len(next(iter(won.values()), ())), left_out


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
    found, n, unread = runs_of(divergences, win_rates)
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
    source = np.random.default_rng(current().stream("bootstrap"))
    drawn = [frontiers(chosen, kept, source.integers(0, n, n)) for _ in range(DRAWS)]
    measures = _measures(frontiers(chosen, kept, np.arange(n)), drawn, kept, n)
    measures += [_past(arm, runs, n) for arm, runs in chosen.items()]
    samples: list[Row] = [
        {"arm": arm, "run": r.name, "divergence": r.divergence, "win_rate": float(r.won_N.mean())}
        for arm, runs in chosen.items()
        for r in sorted(runs, key=lambda r: r.divergence)
    ]
    left_out = [k for k in sorted(budgets or BUDGETS) if k not in kept]
    meta: dict[str, Json] = {"kind": "frontier", "arms": [*arms], "left_out": cast(Json, left_out)}
    meta["prompts_left_out"] = unread
    return Report("win rate at equal divergence", measures, Table("record", samples), meta)


def _measures(
    whole: Mapping[str, Sequence[float]],
    drawn: Sequence[Mapping[str, Sequence[float]]],
    budgets: Sequence[float],
    n: int,
) -> list[Measure]:
    def interval(values: Sequence[float]) -> tuple[float, float]:
        low, high = np.quantile(values, [0.025, 0.975])
        return float(low), float(high)

    first, second = list(whole)[:2]
    made: list[Measure] = []
    for i, budget in enumerate(budgets):
        within = f"{budget:g} nats"
        for arm, values in whole.items():
            ends = interval([d[arm][i] for d in drawn])
            made.append(Measure(f"win rate {arm}", values[i], *ends, n, "share", within, "higher"))
    gaps = [float(np.mean(d[first]) - np.mean(d[second])) for d in drawn]
    gap = float(np.mean(whole[first]) - np.mean(whole[second]))
    return [Measure(f"{first} less {second}", gap, *interval(gaps), n, "share", "", ""), *made]


def _past(arm: str, runs: Sequence[Run], n: int) -> Measure:
    furthest = max(runs, key=lambda r: r.divergence)
    lost = max(float(r.won_N.mean()) for r in runs) - float(furthest.won_N.mean())
    return Measure(f"past the peak {arm}", lost, lost, lost, n, "share", "", "lower")

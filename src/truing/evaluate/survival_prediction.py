"""How well a model predicts survival, and how good its reasons are, on held-out patients.

Status: accuracy and macro F1 (scikit-learn), and the concordance of predicted months (Harrell: of
the pairs of which it is known who lived longer, the share in the right order, ties one half), which
alone takes censored patients as they are. Months: MAE, RMSE and R2 (scikit-learn) on patients whose
event was seen; of the others only a lower bound is known. Beside them "MAE of the mean", what one
reaches by always saying the mean of `reference`, or of the patients themselves without it.

Answers that cannot be read have no status and no months: the coverage says how many can, accuracy
and F1 count the others as wrong, the measures of months leave them out. Answers against the row's
own completion: BLEU, ROUGE, BERTScore as in `evaluate/text_overlap`. Reasons without a reference,
by cosines of sentence vectors: prompt and steps (mean: relevance; least; greatest: prompt overlap),
one step and the next (coherence, of two steps or more). Intervals are Wilson's, also where F1 or
concordance are 0 or 1, else bootstraps over patients.

Source: OncoReason, arXiv 2510.17532. MAPE is left out, since it explodes near zero months; AUC,
since an answer states a status and no probability. A research demonstration, not medical advice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from sklearn import metrics

from truing.context import Json
from truing.core.embed import embed
from truing.core.stats import bootstrap, resampled, wilson
from truing.errors import InputError
from truing.evaluate.adherence import answer_all
from truing.evaluate.text_overlap import overlap
from truing.method import method
from truing.models import Model
from truing.reports import Measure, Report
from truing.tables import Row, Table, user_text
from truing.train.reward.survival_answer import Prediction, parse, steps_of, truth


@dataclass(frozen=True)
class Case:
    """A patient and what was said of it."""

    status: int
    months: float
    said: Prediction


Score = Callable[[Sequence[Case]], float]


def concordance(cases: Sequence[Case]) -> float:
    """Harrell's concordance of predicted months; NaN when no pair can be compared."""
    some = [(c.months, c.said.months, c.status) for c in cases if c.said.months is not None]
    if not some:
        return math.nan
    true_N, said_N, event_N = (np.array(column, float) for column in zip(*some, strict=True))
    _, place_N = np.unique(said_N, return_inverse=True)
    order_N = np.argsort(true_N)[::-1]
    later_S = np.zeros(place_N.max() + 1)  # of those who live longer, how many were told each time
    right = pairs = 0.0
    for at in np.split(order_N, np.flatnonzero(np.diff(true_N[order_N])) + 1):
        own = place_N[at[event_N[at] == 1]]
        if len(own):
            most, up_to_S = later_S.sum(), later_S.cumsum()
            pairs += len(own) * most
            right += float((most - up_to_S[own] + later_S[own] / 2).sum())
        later_S += np.bincount(place_N[at], minlength=len(later_S))
    return right / pairs if pairs else math.nan


def macro_f1(cases: Sequence[Case]) -> float:
    """Mean F1 of both classes; an unreadable answer is a wrong one."""
    gold = [c.status for c in cases]
    said = [c.said.status if c.said.status is not None else 1 - c.status for c in cases]
    score: Callable[..., float] = metrics.f1_score  # its stub knows no number for zero_division
    return float(score(gold, said, average="macro", labels=[0, 1], zero_division=0))


def months_of(cases: Sequence[Case]) -> tuple[list[float], list[float]]:
    """(true, predicted) months where the event was seen and months were said."""
    both = [(c.months, c.said.months) for c in cases if c.status == 1 and c.said.months is not None]
    return [t for t, _ in both], [m for _, m in both]


def mae(cases: Sequence[Case]) -> float:
    """Mean absolute error of months; NaN where there is none."""
    gold, said = months_of(cases)
    return float(metrics.mean_absolute_error(gold, said)) if gold else math.nan


def trace_quality(prompt: str, steps: Sequence[str]) -> dict[str, float]:
    """Cosines of prompt and steps; coherence only where there are two steps."""
    vectors_ND = embed([prompt, *steps])
    near_N = vectors_ND[1:] @ vectors_ND[0]
    made = {"relevance": near_N.mean(), "minimum relevance": near_N.min()}
    made["prompt overlap"] = near_N.max()
    if len(steps) > 1:
        made["coherence"] = (vectors_ND[1:-1] * vectors_ND[2:]).sum(1).mean()
    return {n: float(v) for n, v in made.items()}


@method(
    paper="oncoreason",
    needs=("generate",),
    rows={"data": ("prompt",), "reference": ()},  # outcomes: columns are looked for by name
    within={"max_tokens": (1, None)},
)
def survival_prediction(
    model: Model, data: Table, reference: Table | None = None, *, max_tokens: int = 256
) -> Report:
    """How well a model predicts survival, and how good its reasons are, on held-out patients.

    Args:
        data: rows of `survival_cohort`: prompt, completion, status, months.
        reference: training rows, whose mean months are the baseline.
        max_tokens: longest answer.
    """
    where = "evaluate/survival_prediction"
    rows = list(data.expect("prompt", where=where))
    if not rows:
        raise InputError("no patient to ask about", where=where)
    truths = [truth(r, data.place(i)) for i, r in enumerate(rows)]
    texts = [t for t, _ in answer_all(model, rows, max_tokens=max_tokens, temperature=0.0)]
    cases = [
        Case(status, months, parse(text))
        for (status, months), text in zip(truths, texts, strict=True)
        if months is not None
    ]
    if len(cases) < len(rows):
        raise InputError(
            "a row has no months",
            where=data.source,
            seen=len(rows) - len(cases),
            fix="Fill column 'months', or leave such rows out",
        )
    measures = _predictions(cases, _mean_months(reference if reference is not None else data))
    if all("completion" in r for r in rows):
        measures += overlap(texts, [str(r["completion"]) for r in rows])
    measures += _reasons(rows, cases)
    samples: list[Row] = [
        {
            "prompt": r["prompt"],
            "completion": text,
            "status": c.status,
            "months": c.months,
            "said_status": c.said.status,
            "said_months": c.said.months,
            "lineage": {"parents": [r["id"]]},
        }
        for r, text, c in zip(rows, texts, cases, strict=True)
    ]
    meta: dict[str, Json] = {"kind": "survival", "model": model.name, "model_key": model.key}
    return Report("survival prediction", measures, Table("record", samples), meta)


def _predictions(cases: Sequence[Case], usual: float) -> list[Measure]:
    n = len(cases)
    whole = sum(c.said.whole for c in cases)
    read = sum(c.said.status is not None and c.said.months is not None for c in cases)
    right = sum(c.said.status == c.status for c in cases)
    shares = {"coverage": read, "all blocks": whole, "accuracy": right}
    made = [
        Measure(name, k / n, *wilson(k, n), n, "share", "", "higher") for name, k in shares.items()
    ]
    for name, score in (("macro F1", macro_f1), ("concordance", concordance)):
        if math.isfinite(value := score(cases)):
            # At its end resamples are all alike.
            ends = wilson(value * n, n) if value in (0, 1) else _interval(cases, score)
            made.append(Measure(name, value, *ends, n, "share", "", "higher"))
    return [*made, *_errors(cases, usual)]


def _errors(cases: Sequence[Case], usual: float) -> list[Measure]:
    gold, said = months_of(cases)
    k = len(gold)
    if not k:
        return []
    rmse = float(metrics.root_mean_squared_error(gold, said))
    base = float(metrics.mean_absolute_error(gold, [usual] * k))
    made = [
        Measure("MAE", mae(cases), *_interval(cases, mae), k, "months", "", "lower"),
        Measure("RMSE", rmse, rmse, rmse, k, "months", "", "lower"),
        Measure("MAE of the mean", base, base, base, k, "months", "", ""),
    ]
    if len(set(gold)) > 1:
        r2 = float(metrics.r2_score(gold, said))
        made.append(Measure("R2", r2, r2, r2, k, "share", "", "higher"))
    return made


def _reasons(rows: Sequence[Row], cases: Sequence[Case]) -> list[Measure]:
    found: dict[str, list[float]] = {}
    for row, case in zip(rows, cases, strict=True):
        if steps := steps_of(case.said.reasoning or ""):
            for name, value in trace_quality(user_text(row["prompt"]), steps).items():
                found.setdefault(name, []).append(value)
    return [
        Measure(name, sum(v) / len(v), *bootstrap(v), len(v), "cosine", "", "higher")
        for name, v in found.items()
    ]


def _mean_months(data: Table) -> float:
    known = [m for s, m in (truth(r, data.source) for r in data) if s == 1 and m is not None]
    if not known:
        raise InputError(
            "no event was seen, so there is no mean to compare with",
            seen=data.source,
            fix="Give as reference rows of which some have status 1",
        )
    return sum(known) / len(known)


def _interval(cases: Sequence[Case], score: Score) -> tuple[float, float]:
    """95 % interval by a bootstrap over patients."""
    return resampled(lambda at: score([cases[i] for i in at.tolist()]), len(cases))

"""Find faults in a set of principles: duplicates, contradictions, rules that nothing measures.

Duplicates: two rule texts whose sentence vectors have a cosine above `similar`. Contradictions are
found by the checks themselves on answers of a model: with x_i in {0, 1} whether an answer keeps
principle i, a pair is reported when the correlation phi = cov(x_i, x_j) / (sd_i sd_j) is below
`opposed` with its 95 % interval (Fisher's z) below zero, or when no answer keeps both although
p_i p_j n >= 5 were expected to. A rule that every sampled answer breaks is named too: no pair of
answers can be made from it. Our own; no paper.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
from numpy.typing import NDArray

from truing.context import Json, current
from truing.errors import InputError
from truing.method import method
from truing.models import Model
from truing.principles import Principles
from truing.reports import Measure, Report
from truing.specify.principles_file import check_all
from truing.specify.satisfaction import KEPT, satisfaction
from truing.tables import Message, Row, Table, prompt_of

WHERE = "specify/lint"
FAULTS = ("duplicate", "contradiction", "never kept", "not measured")
FROM_ANSWERS = FAULTS[1:3]  # which only answers can show


def phi(x: Sequence[bool], y: Sequence[bool]) -> tuple[float, float, float]:
    """Correlation of two binary columns with its 95 % interval; (0, -1, 1) when one is constant."""
    n = len(x)
    px, py = sum(x) / max(n, 1), sum(y) / max(n, 1)
    spread = math.sqrt(px * (1 - px) * py * (1 - py))
    if spread == 0 or n < 4:
        return 0.0, -1.0, 1.0
    both = sum(a and b for a, b in zip(x, y, strict=True)) / n
    r = (both - px * py) / spread
    z = math.atanh(max(min(r, 0.999999), -0.999999))
    half = 1.96 / math.sqrt(n - 3)
    return r, math.tanh(z - half), math.tanh(z + half)


def contradictions(kept: Mapping[str, Sequence[bool]], opposed: float) -> list[Row]:
    """Findings on pairs of principles, from whether each answer keeps each of them."""
    rows: list[Row] = []
    for i, j in itertools.combinations(kept, 2):
        x, y = kept[i], kept[j]
        n = len(x)
        r, lo, hi = phi(x, y)
        both = sum(a and b for a, b in zip(x, y, strict=True))
        expected = sum(x) * sum(y) / max(n, 1)
        never = both == 0 and expected >= 5
        if never or (r < opposed and hi < 0):
            detail = f"correlation {r:.2f} [{lo:.2f}, {hi:.2f}]; both kept by {both} of {n} answers"
            rows.append(_finding("contradiction", [i, j], detail, r))
    return rows


def text_cosines(texts: Sequence[str]) -> NDArray[np.floating]:
    """Cosines [N, N] of the texts' sentence vectors."""
    from truing.core.embed import embed

    vectors_ND = embed(list(texts))
    return vectors_ND @ vectors_ND.T


def duplicates(principles: Principles, similar: float) -> list[Row]:
    """Findings on rules whose texts mean nearly the same, or that have the same check."""
    items = list(principles)
    cosines_NN = text_cosines([p.text for p in items])
    rows: list[Row] = []
    for i, j in itertools.combinations(range(len(items)), 2):
        cosine = float(cosines_NN[i, j])
        same_check = items[i].check is not None and items[i].check == items[j].check
        if cosine >= similar or same_check:
            detail = "the same check" if same_check else f"cosine of the texts {cosine:.2f}"
            rows.append(_finding("duplicate", [items[i].id, items[j].id], detail, cosine))
    return rows


def _finding(fault: str, ids: Sequence[str], detail: str, value: float = 0.0) -> Row:
    return {
        "fault": fault,
        "principles": ", ".join(ids),
        "detail": detail,
        "value": round(value, 6),
        "lineage": {"principle": ids[0], "principles": list(ids)},
    }


def sampled_answers(model: Model, prompts: Table, k: int, max_tokens: int) -> list[Row]:
    """k answers of the model to each prompt, as rows with prompt, completion and finished."""
    from truing.core.generate import generate

    asked = [prompt_of(r) for r in prompts.expect("prompt", where=WHERE)]
    drawn = generate(model, asked, n=k, max_tokens=max_tokens, seed=current().stream("answers"))
    return [
        {"prompt": prompt, "completion": c.text, "finished": c.finish == "stop"}
        for prompt, items in zip(asked, drawn, strict=True)
        for c in items
    ]


def _check_given(model: Model | None, prompts: Table | None, answers: Table | None) -> None:
    """Raise an InputError where answers are not given in one whole way."""
    if answers is not None and (model is not None or prompts is not None):
        raise InputError(
            "answers are given, and a model or prompts to sample others from",
            where=WHERE,
            fix="Give the answers alone, or leave them out",
        )
    if (model is None) != (prompts is None):
        there, lacks = ("prompts", "model") if model is None else ("model", "prompts")
        raise InputError(
            f"input {there!r} is given without {lacks!r}, and answers need both",
            where=WHERE,
            fix=f"Give {lacks!r} too, or 'answers' in their place",
        )


def _answers(
    model: Model | None, prompts: Table | None, answers: Table | None, k: int, max_tokens: int
) -> list[Row]:
    """Answers as given or as sampled, as rows with prompt and completion; none without either."""
    if answers is not None:
        return [_as_answer(row) for row in answers.expect("example", where=WHERE)]
    if model is not None and prompts is not None:
        return sampled_answers(model, prompts, k, max_tokens)
    return []


def _as_answer(row: Row) -> Row:
    """A row with prompt and completion, also when it came as messages, whose last is the answer."""
    if "completion" in row:
        return row
    messages = cast("list[Message]", row["messages"])
    said = messages[-1]["content"] if messages else ""
    return row | {"prompt": messages[:-1], "completion": said}


@method(
    rows={"prompts": ("prompt",), "answers": ("example",)},
    within={"similar": (-1, 1), "opposed": (-1, 1), "k": (1, None), "max_tokens": (1, None)},
)
def lint(
    principles: Principles,
    model: Model | None = None,
    prompts: Table | None = None,
    answers: Table | None = None,
    *,
    similar: float = 0.85,
    opposed: float = -0.4,
    k: int = 4,
    max_tokens: int = 128,
) -> Report:
    """Find faults in a set of principles: duplicates, contradictions, rules that nothing measures.

    Contradictions and rules that are never kept need answers, a table of them or a model and
    prompts to sample them from, and checks; without, the report says nothing of the two.

    Args:
        similar: cosine of two rule texts at which they are reported as duplicates.
        opposed: correlation of two rules on the answers below which they contradict.
        k: answers sampled per prompt.
        max_tokens: length limit of a sampled answer.
    """
    check_all(principles)
    _check_given(model, prompts, answers)
    findings = duplicates(principles, similar)
    rows: list[Row] = []
    if any(p.check for p in principles):
        rows = _answers(model, prompts, answers, k, max_tokens)
    kept_by = satisfaction(principles, rows, where=WHERE) if rows else []
    usable = [s for s in kept_by if not s.unusable]
    used = len(usable)
    if usable:
        kept = {p.id: [s.by_principle[p.id] >= KEPT for s in usable] for p in principles if p.check}
        findings += contradictions(kept, opposed)
        findings += [
            _finding("never kept", [id], f"broken by all {used} answers")
            for id, values in kept.items()
            if not any(values)
        ]
    findings += [
        _finding("not measured", [p.id], "no check: only a judge could tell")
        for p in principles
        if p.check is None
    ]
    looked_for = [f for f in FAULTS if usable or f not in FROM_ANSWERS]
    counts = {f: sum(r["fault"] == f for r in findings) for f in looked_for}
    measures = [
        Measure(fault, float(c), float(c), float(c), len(principles), "findings", "", "lower")
        for fault, c in counts.items()
    ]
    facts: dict[str, Json] = {
        "kind": "lint",
        "answers": used,
        "principles": [p.id for p in principles],
    }
    return Report("faults of the principles", measures, Table("record", findings), facts)

"""Can a reward be relied on that was inferred from data: on unseen data, and under optimisation?

    accuracy      mean of [s(y*) > s(y)], ties 1/2      y* chosen or demonstrated, y rejected or own
    calibration   sum_b n_b / n |right_b - sure_b|, sure = sigmoid(beta |s(y*) - s(y)|), in ten bins
    best of N     E[s of the largest of N draws], and of the gold reward of the same draw, beside
                  KL(best of N || policy) = log N - (N - 1) / N
    not identified   v / (v + w),  w = mean_x var_y s,  v = var_x(mean_y s) - w / K, 0 at least:
                     comparisons leave any function of the prompt open

`data` are held-out pairs, or held-out demonstrations, which are compared with the policy's own
answers. `unseen` are the same of another domain: how much less often the reward is right there says
how it generalises. With a policy N goes through 1, 2, 4, ... `answers`, each an expectation over
all choices of N among the draws. With `gold`, a reward or check that is known to be right, these
show over-optimisation: gold falls while the proxy rises, and "gold lost past the peak" is how far
it has fallen at the largest N, from the peak that the other half of the prompts has: without a loss
it is 0 but for chance, and may be below. `others` are the same reward inferred again, with another
seed or from other demonstrations: how often both order two draws alike says how far the data
determine it. Length is correlated with the score within prompts. Which of this was measured, and
what the rest needs, stands in `checklist` of the report. Intervals are over prompts: Wilson's of
outcomes, else bootstraps, of the calibration error, which chance raises, the basic one.

Source: the quality of rewards in "Inverse Reinforcement Learning Meets Large Language Model
Post-Training", arXiv 2507.13158, a survey that gives no formulas; these are the usual ones.

Shapes: U prompts, K draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from truing.context import Json, current
from truing.core.generate import generate
from truing.core.judging.reward_quality import (
    Compared,
    Places,
    Scores,
    accuracy_lost,
    alike,
    best_of_measures,
    mean_measure,
    measured,
    order_measures,
    unidentified,
    within_prompts,
)
from truing.core.judging.rewards import check_reward_model, score_model
from truing.core.judging.scores import check_reward, total_scores
from truing.core.passes.scoring import has_head
from truing.errors import InputError
from truing.method import method
from truing.models import Model
from truing.reports import Measure, Report
from truing.specify.texts import words
from truing.tables import Message, Row, Table, as_prompt

WHERE = "evaluate/reward_diagnostics"
Draws = list[list[Row]]  # the policy's answers, [prompt][draw]


def _demonstration(row: Row, where: str) -> Row:
    """Prompt and answer of a demonstration, which may be one dialogue, with its other columns."""
    if isinstance(row.get("completion"), str) and "prompt" in row:
        return as_prompt(row)
    messages = cast("list[Message]", row.get("messages") or [])
    if len(messages) < 2 or messages[-1].get("role") != "assistant":
        raise InputError(
            "a demonstration ends with an answer",
            where=where,
            seen=[*row],
            fix="Give rows with prompt and completion, or messages that end with the assistant's",
        )
    return row | {"prompt": messages[:-1], "completion": str(messages[-1]["content"])}


def _sides(data: Table) -> tuple[list[Row], Draws]:
    """What is to be preferred, and what is given to compare it with: nothing to demonstrations."""
    if data.kind == "example":
        return [_demonstration(r, data.place(i)) for i, r in enumerate(data)], []
    rows = [as_prompt(r) for r in data]
    sides = [
        [r | {"completion": r[name], "finished": r.get(f"{name}_finished", True)} for r in rows]
        for name in ("chosen", "rejected")
    ]
    return sides[0], [[row] for row in sides[1]]


def _drawn(policy: Model, rows: Sequence[Row], name: str, how: Mapping[str, object]) -> Draws:
    seed = current().stream(name) % 2**31
    made = generate(policy, [r["prompt"] for r in rows], seed=seed, **how)  # type: ignore[arg-type]
    return [
        [r | {"completion": c.text.strip(), "finished": c.finish == "stop"} for c in some]
        for r, some in zip(rows, made, strict=True)
    ]


def _scores(reward: Model, rows: Sequence[Sequence[Row]]) -> Scores:
    """What a reward model says, [U, K]."""
    flat = score_model(reward, [row for some in rows for row in some])
    return np.array(flat, float).reshape(len(rows), -1)


@dataclass(frozen=True)
class _Part:
    """One table: what is to be preferred, how it compares, and the policy's draws, if any."""

    first: list[Row]
    side: Compared
    draws: Draws
    own: Scores | None

    def samples(self, domain: str) -> list[Row]:
        """A row for each answer that is to be preferred."""
        return [
            {
                "prompt": r["prompt"],
                "completion": r["completion"],
                "domain": domain,
                "score": float(s),
                "share_won": float(w),
                "lineage": {"parents": [r["id"]]},
            }
            for r, s, w in zip(self.first, self.side.first, self.side.right, strict=True)
        ]


def _part(
    reward: Model, policy: Model | None, data: Table, name: str, how: Mapping[str, object]
) -> _Part:
    """Score one table; `name` is "" for the reward's own domain, whose prompts are always drawn."""
    first, given = _sides(data)
    draws: Draws = []
    if policy is not None and not (given and name):
        draws = _drawn(policy, first, f"draws/{name}", how)
    if not (given or draws):
        raise InputError(
            "demonstrations are compared with a policy's own answers",
            where=f"{WHERE} input 'policy'",
            fix="Give the model that is to be trained, or pairs",
        )
    own_UK = _scores(reward, draws) if draws else None
    other_UK = own_UK if own_UK is not None and not given else _scores(reward, given)
    side = Compared(_scores(reward, [[r] for r in first])[:, 0], other_UK)
    return _Part(first, side, draws, own_UK)


def _of_draws(
    draws: Draws, own_UK: Scores, others: Mapping[str, Model], gold: dict[str, object] | None
) -> list[Measure]:
    """What the policy's answers show: what is open, length, agreement, over-optimisation."""
    n = len(draws)
    length_UK = np.array([[float(len(words(str(r["completion"])))) for r in d] for d in draws])

    def by_length(at: Places) -> float:
        return within_prompts(own_UK, length_UK, at)

    made = [
        measured("not identified", n, lambda at: unidentified(own_UK[at]), "share", "", ""),
        measured("length with score", n, by_length, "correlation", "", ""),
    ]
    for name, other in others.items():
        pairs = zip(own_UK, _scores(other, draws), strict=True)
        same_U = np.array([alike(a_K, b_K) for a_K, b_K in pairs])
        made.append(mean_measure("ordered alike", same_U, "share", name, "higher"))
    gold_UK: Scores | None = None
    if gold is not None:
        flat = total_scores(gold, [r for d in draws for r in d], where=f"{WHERE} setting 'gold'")
        gold_UK = np.array(flat, float).reshape(own_UK.shape)
    return made + best_of_measures(own_UK, gold_UK)


def _checklist(given: Mapping[str, bool]) -> dict[str, Json]:
    """What was measured, and what the rest needs."""
    needs = {
        "ranks held-out data first": "",
        "calibrated": "",
        "generalises to unseen data": "unseen",
        "determined by the data: open between prompts": "policy",
        "determined by the data: inferred again alike": "others",
        "free of length": "policy",
        "proxy under optimisation": "policy",
        "over-optimisation": "gold",
    }
    return {
        item: "measured" if not name or given[name] else f"needs {name}"
        for item, name in needs.items()
    }


@method(
    paper="irl-survey",
    rows={"data": ("pair", "example"), "unseen": ("pair", "example")},
    within={
        "answers": (2, None),
        "max_tokens": (1, None),
        "temperature": "(0, inf)",
        "beta": "(0, inf)",
    },
)
def reward_diagnostics(
    reward: Model,
    data: Table,
    policy: Model | None = None,
    unseen: Table | None = None,
    others: dict[str, Model] | None = None,
    *,
    gold: dict[str, object] | None = None,
    answers: int = 16,
    max_tokens: int = 64,
    temperature: float = 1.0,
    beta: float = 1.0,
) -> Report:
    """Can a reward be relied on that was inferred from data: on unseen data, and under pressure?

    Args:
        reward: a reward model, or a tuned language model with its implicit reward.
        data: held-out pairs, or demonstrations, whose own answers the policy then gives.
        policy: the model that is to be trained, whose draws are scored.
        unseen: pairs or demonstrations of another domain.
        others: the same reward inferred again, by name.
        gold: reward or check that is known to be right, {use: name, ...}.
        answers: K, draws of the policy to each prompt.
        max_tokens: longest answer drawn.
        temperature: that answers are drawn at.
        beta: of a tuned language model, whose s is a log-ratio: that it was trained with.
    """
    for one in (reward, *(others or {}).values()):
        check_reward_model(one, WHERE)
    if beta != 1 and (has_head(reward) or "generate" not in reward.can):
        told = "setting 'beta' counts for nothing: the reward scores by a head"
        raise InputError(told, where=WHERE, seen=beta, fix="Leave it out")
    if gold is not None:
        check_reward(gold, where=f"{WHERE} setting 'gold'")
    if policy is None and (gold is not None or others):
        raise InputError(
            "needs a policy whose answers are scored",
            where=f"{WHERE} input 'policy'",
            fix="Give a policy, or leave out gold and others",
        )
    how = {"n": answers, "max_tokens": max_tokens, "temperature": temperature}
    known = _part(reward, policy, data.expect("pair", "example", where=WHERE), "", how)
    measures, samples = order_measures(known.side, "", beta), known.samples("held out")
    if unseen is not None:
        far = _part(reward, policy, unseen.expect("pair", "example", where=WHERE), "unseen", how)
        measures += [*order_measures(far.side, "unseen", beta), accuracy_lost(known.side, far.side)]
        samples += far.samples("unseen")
    if known.own is not None:
        measures += _of_draws(known.draws, known.own, others or {}, gold)
    had = {
        "unseen": unseen is not None,
        "policy": policy is not None,
        "others": bool(others),
        "gold": gold is not None,
    }
    meta: dict[str, Json] = {
        "kind": "reward_diagnostics",
        "reward": reward.name,
        "checklist": (checks := _checklist(had)),
    }
    meta["notes"] = [f"not measured: {n}, which {w}" for n, w in checks.items() if w != "measured"]
    return Report("quality of a reward", measures, Table("record", samples), meta)

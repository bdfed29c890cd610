"""Let an evaluator trained on easy problems choose among solutions of hard ones.

    best of n         the answer of argmax_i s_i
    majority          the most frequent answer
    weighted voting   argmax_a sum_{i: answer_i = a} s_i,    s_i = aggregate of the step scores

n solutions of each problem are drawn, s_i is what the reward model says of solution i: a process
reward model's steps (parted by a blank line) by their minimum or product, or an outcome model's
sigmoid score. Accuracy is reported for each `level` of the problems and over all, beside that of a
single solution. Solutions without an answer are dropped from voting and are wrong; ties go to what
was drawn first. With equal scores weighted voting is the majority's.

An answer is what follows the last "####" or "# Answer", else the last number of the text; numbers
are compared by value, "1/2" being 0.5, other answers without case and outer punctuation.
Source: "Easy-to-Hard Generalization: Scalable Alignment Beyond Human Supervision", arXiv
2403.09472. Its training half is `sft` and `process_reward` on easy rows; the rewards of its
reinforcement learning are `min_rewards` and `prod_rewards` there.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

from truing.context import current
from truing.core.generate import generate
from truing.core.rewards import score_model
from truing.core.scoring import has_head, step_scores
from truing.core.stats import wilson
from truing.errors import InputError
from truing.method import method
from truing.models import Model
from truing.reports import Measure, Report
from truing.tables import Row, Table
from truing.train.reward.process_reward import AGGREGATES, steps_of

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?")
MARK = re.compile(r"####|#\s*Answer", re.IGNORECASE)
WAYS = ("single", "majority", "best of n", "weighted voting")
RewardBy = Literal["min", "prod", "mean", "last", "outcome"]


def answer_of(text: str) -> str:
    """The answer of a solution; "" when it has none."""
    marks = list(MARK.finditer(text))
    if marks:
        lines = [line for line in text[marks[-1].end() :].splitlines() if line.strip()]
        return lines[0].strip() if lines else ""
    numbers = NUMBER.findall(text)
    return numbers[-1] if numbers else ""


def normal(answer: str) -> str:
    """One form for answers that mean the same."""
    text = answer.strip().strip("$ .").lower()
    found = NUMBER.fullmatch(text.replace("$", ""))
    if found is None:
        return text.strip(" .,;:!?\"'")
    try:
        return str(Fraction(found[0].replace(",", "")))
    except (ValueError, ZeroDivisionError):
        return text


def vote(answers: Sequence[str], weights: Sequence[float]) -> str:
    """The answer with the largest sum of weights; "" counts for none."""
    sums: dict[str, float] = defaultdict(float)
    for answer, weight in zip(answers, weights, strict=True):
        if answer:
            sums[answer] += weight
    return max(sums, key=lambda a: sums[a]) if sums else ""


def best(answers: Sequence[str], scores: Sequence[float]) -> str:
    """The answer of the solution that scores highest."""
    return answers[max(range(len(scores)), key=lambda i: scores[i])]


def chosen(answers: Sequence[str], scores: Sequence[float]) -> dict[str, str]:
    """What each way of choosing takes, "single" being the first solution."""
    ones = [1.0] * len(answers)
    found = (answers[0], vote(answers, ones), best(answers, scores), vote(answers, scores))
    return dict(zip(WAYS, found, strict=True))


def scores_of(reward: Model, prompt: object, texts: Sequence[str], by: RewardBy) -> list[float]:
    """A score in [0, 1] for each solution; 0 for an empty one."""
    if by == "outcome":
        rows: list[Row] = [{"prompt": prompt, "completion": t} for t in texts]
        return [_sigmoid(s) for s in score_model(reward, rows)]
    parts = [steps_of(t) for t in texts]
    some = [i for i, steps in enumerate(parts) if steps]
    made = [0.0] * len(texts)
    asked: list[Row] = [{"prompt": prompt, "steps": parts[i]} for i in some]
    for i, steps in zip(some, step_scores(reward, asked, "\n\n"), strict=True):
        made[i] = AGGREGATES[by]([_sigmoid(s) for s in steps])
    return made


def _sigmoid(s: float) -> float:
    return 1 / (1 + math.exp(-s)) if s > -700 else 0.0


@method(paper="easy-to-hard", needs=("generate",))
def easy_to_hard(
    model: Model,
    reward: Model,
    data: Table,
    *,
    n: int = 8,
    by: RewardBy = "min",
    temperature: float = 0.7,
    max_tokens: int = 256,
) -> Report:
    """Let an evaluator trained on easy problems choose among solutions of hard ones.

    Args:
        n: solutions drawn of each problem.
        by: how a process reward model's steps make one score; "outcome" takes a score of the whole.
        temperature: that solutions are drawn at.
        max_tokens: longest solution.
    """
    where = "evaluate/easy_to_hard"
    if by != "outcome" and not has_head(reward):
        raise InputError(
            "step scores come from a model with a score head", where=where, seen=reward.name,
            fix="Train one with process_reward, or set by='outcome'",
        )  # fmt: skip
    problems = list(data)
    for i, row in enumerate(problems):
        if "prompt" not in row or not isinstance(row.get("answer"), (str, int, float)):
            raise InputError("needs prompt and answer", where=data.place(i), seen=row)
    drawn = generate(
        model, [r["prompt"] for r in problems], n=n, temperature=temperature,
        max_tokens=max_tokens, seed=current().stream("solutions") % 2**31,
    )  # fmt: skip
    samples: list[Row] = []
    for i, (row, solutions) in enumerate(zip(problems, drawn, strict=True), 1):
        texts = [s.text for s in solutions]
        scores = scores_of(reward, row["prompt"], texts, by)
        taken = chosen([normal(answer_of(t)) for t in texts], scores)
        right = {way: normal(str(row["answer"])) == answer for way, answer in taken.items()}
        samples.append(
            {"prompt": row["prompt"], "completions": texts, "scores": scores,
             "answer": str(row["answer"]), "level": str(row.get("level", "")),
             **right, "lineage": {"parents": [row["id"]], "generator": model.name}}
        )  # fmt: skip
        current().progress(i, len(problems), "problems")
    levels = sorted({str(s["level"]) for s in samples} - {""})
    measures = [_accuracy(samples, way, level) for level in ["", *levels] for way in WAYS]
    meta = {"kind": "easy_to_hard", "model": model.name, "reward": reward.name, "n": n, "by": by}
    return Report("choosing among solutions", measures, Table("group", samples), dict(meta))


def _accuracy(samples: Sequence[Row], way: str, level: str) -> Measure:
    some = [bool(s[way]) for s in samples if level in ("", s["level"])]
    low, high = wilson(sum(some), len(some))
    name = f"level {level}" if level else ""
    return Measure(way, sum(some) / len(some), low, high, len(some), "share", name, "higher")

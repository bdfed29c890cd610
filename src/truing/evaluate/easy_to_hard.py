"""Let an evaluator trained on easy problems choose among solutions of hard ones.

    best of n         the answer of argmax_i s_i
    majority          the most frequent answer
    weighted voting   argmax_a sum_{i: answer_i = a} s_i,    s_i = aggregate of the step scores

n solutions of each problem are drawn, s_i is what the reward model says of solution i: a process
reward model's steps (parted by a blank line) by their minimum or product, or an outcome model's
sigmoid score of the last token. A model of values (`step_value`) is refused: what votes must not be
negative. Beside `reward`, an outcome model (ORM, `outcome_reward`) and one of outcomes and steps
(OPRM, `outcome_process_reward`, asked as `reward` is) can choose among the same solutions. Accuracy
is reported for each `level` of the problems and over all, beside that of a single solution.
Solutions without an answer are dropped from voting and are wrong; ties go to what was drawn first.
With equal scores weighted voting is the majority's.

An answer is what follows the last "####" or "# Answer", else the last number of the text; numbers
are compared by value, "1/2" being 0.5, other answers without case and outer punctuation.
Source: "Easy-to-Hard Generalization: Scalable Alignment Beyond Human Supervision", arXiv
2403.09472. Its training half is `sft` and the reward models on easy rows, labelled by `step_labels`
and `outcome_labels`; its reinforcement learning is `easy_to_hard_ppo`. ReST-EM, which the paper
compares it with, is `sft` on the solutions that `outcome_labels` found right.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Literal

from truing.context import Json, current
from truing.core.drawing import Completion
from truing.core.generate import generate
from truing.core.judging.answer_steps import AGGREGATES, steps_of, values_where_known
from truing.core.judging.numerals import exact_number, numbers
from truing.core.judging.rewards import probabilities
from truing.core.passes.scoring import check_answers, check_logits, check_steps
from truing.core.stats import wilson
from truing.errors import InputError
from truing.method import method
from truing.models import Model
from truing.reports import Measure, Report
from truing.tables import Row, Table, as_prompt

MARK = re.compile(r"####|#\s*Answer", re.IGNORECASE)
WAYS = ("single", "majority", "best of n", "weighted voting")
CHOOSING = WAYS[2:]  # by a reward model
WHERE = "evaluate/easy_to_hard"
RewardBy = Literal["min", "prod", "mean", "last", "outcome"]


def answer_of(text: str) -> str:
    """The answer of a solution; "" when it has none."""
    marks = list(MARK.finditer(text))
    if marks:
        lines = [line for line in text[marks[-1].end() :].splitlines() if line.strip()]
        return lines[0].strip() if lines else ""
    found = numbers(text)
    return text[found[-1].start : found[-1].end] if found else ""


def normal(answer: str) -> str:
    """One form for answers that mean the same."""
    text = answer.strip().lstrip("$ ").rstrip("$ .").lower()
    value = exact_number(text.replace("$", ""))
    return str(value) if value is not None else text.strip(" .,;:!?\"'")


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


def scores_of(
    reward: Model, prompt: object, texts: Sequence[str], by: RewardBy, finished: Sequence[bool]
) -> list[float]:
    """A score in [0, 1] for each solution; 0 for an empty one."""
    if by == "outcome":
        rows: list[Row] = [
            {"prompt": prompt, "completion": t, "finished": end}
            for t, end in zip(texts, finished, strict=True)
        ]
        found = probabilities(reward, rows, WHERE)
        return [p if t.strip() else 0.0 for p, t in zip(found, texts, strict=True)]
    parts = [steps_of(t) for t in texts]
    known = values_where_known(reward, [{"prompt": prompt}] * len(parts), parts, where=WHERE)
    return [AGGREGATES[by](values) if values else 0.0 for values in known]


@method(
    paper="easy-to-hard",
    needs=("generate",),
    rows={"data": ("prompt",)},
    within={"n": (1, None), "temperature": "(0, inf)", "max_tokens": (1, None)},
)
def easy_to_hard(
    model: Model,
    reward: Model,
    data: Table,
    outcome_model: Model | None = None,
    outcome_process_model: Model | None = None,
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
    judges: dict[str, tuple[Model, RewardBy]] = {"": (reward, by)}
    if outcome_model is not None:
        judges["ORM"] = (outcome_model, "outcome")
    if outcome_process_model is not None:
        judges["OPRM"] = (outcome_process_model, by)
    for judge, how in judges.values():
        if how != "outcome":
            check_steps(judge, WHERE)
        else:
            check_answers(judge, WHERE)
        check_logits(judge, WHERE)  # others may be negative, and a vote must never count against
    problems = [as_prompt(r) for r in data.expect("prompt", where=WHERE)]
    for i, row in enumerate(problems):
        given = row.get("answer")
        known = isinstance(given, (str, int, float)) and given == given  # NaN is none
        if not known or not normal(str(given)):
            raise InputError(
                "needs a column 'answer' with the right one of each problem",
                where=data.place(i),
                seen=given,
                fix="Fill it in, or leave the row out",
            )
    drawn = generate(
        model,
        [r["prompt"] for r in problems],
        n=n,
        temperature=temperature,
        max_tokens=max_tokens,
        seed=current().stream("solutions") % 2**31,
    )
    samples: list[Row] = []
    for i, (row, solutions) in enumerate(zip(problems, drawn, strict=True), 1):
        samples.append(_sample(row, solutions, judges, model.name))
        current().progress(i, len(problems), "problems")
    levels = sorted({str(s["level"]) for s in samples} - {""})
    ways = [_named(way, name) for name in judges for way in (CHOOSING if name else WAYS)]
    measures = [_accuracy(samples, way, level) for level in ["", *levels] for way in ways]
    names: dict[str, Json] = {name or "reward": judge.name for name, (judge, _) in judges.items()}
    meta: dict[str, Json] = {"kind": "easy_to_hard", "model": model.name, "n": n, "by": by}
    return Report("choosing among solutions", measures, Table("group", samples), meta | names)


def _named(way: str, judge: str) -> str:
    return f"{way}, {judge}" if judge else way


def _sample(
    row: Row,
    solutions: Sequence[Completion],
    judges: Mapping[str, tuple[Model, RewardBy]],
    generator: str,
) -> Row:
    """The solutions of one problem, their scores, and which way of choosing is right."""
    texts, ends = [s.text for s in solutions], [s.finish == "stop" for s in solutions]
    answers, gold = [normal(answer_of(t)) for t in texts], normal(str(row["answer"]))
    made: Row = {
        "prompt": row["prompt"],
        "completions": texts,
        "finished": ends,
        "answer": str(row["answer"]),
        "level": str(row.get("level", "")),
        "lineage": {"parents": [row["id"]], "generator": generator},
    }
    for name, (judge, by) in judges.items():
        scores = scores_of(judge, row["prompt"], texts, by, ends)
        made[_named("scores", name)] = scores
        taken = chosen(answers, scores)
        made |= {_named(w, name): taken[w] == gold for w in (CHOOSING if name else WAYS)}
    return made


def _accuracy(samples: Sequence[Row], way: str, level: str) -> Measure:
    some = [bool(s[way]) for s in samples if level in ("", s["level"])]
    low, high = wilson(sum(some), len(some))
    name = f"level {level}" if level else ""
    return Measure(way, sum(some) / len(some), low, high, len(some), "share", name, "higher")

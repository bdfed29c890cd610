"""Preference pairs from the model's own answers: the best against the worst by the principles.

For every prompt the model answers k times, half of them with the principles in its context and half
without. Each answer a is scored

    s(a) = sum_i w_i sat_i(a) / sum_i w_i  +  c * cos(prompt, a)  +  j * judge(prompt, a)

with w_i the priority of principle i, sat_i in [0, 1] its check (0 for an empty, repeated or
off-topic answer), cos the relevance by sentence vectors and judge an optional model's verdict in
[0, 1]. The best becomes `chosen`, the worst `rejected`; the pair's lineage names the principle
that separates them most. The pair's prompt carries no principles, so that training moves into
the weights what the context only suggested (context distillation, as in Constitutional AI, arXiv
2212.08073; best against worst of k as in Magpie, arXiv 2406.08464). Here executable checks score
instead of a large judge, because a small model's verdicts are near chance; and the principles
follow the user's words, because a small model heeds them there and hardly in a system message.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from truing.context import current
from truing.errors import InputError
from truing.method import method
from truing.models import Model
from truing.principles import Principles
from truing.specify.satisfaction import ON_TOPIC, Kept, satisfaction
from truing.synthesize.told_answers import Sampling, drawn_answers
from truing.tables import Row, Table


@dataclass(frozen=True)
class Answer:
    """One sampled answer with its score.

    `finished` is False when it hit the length limit; `in_context` when the model saw the rules.
    """

    text: str
    finished: bool
    in_context: bool
    kept: Kept
    score: float


def best_and_worst(scores: Sequence[float]) -> tuple[int, int]:
    """Indices of the largest and the smallest score, the first one on ties."""
    order = range(len(scores))
    return max(order, key=lambda i: (scores[i], -i)), min(order, key=lambda i: (scores[i], i))


def separating_principle(best: Kept, worst: Kept, principles: Principles) -> str:
    """The principle in which two answers differ most, weighted by priority; "" when in none."""
    gains = {
        p.id: p.priority * (best.by_principle[p.id] - worst.by_principle[p.id])
        for p in principles
        if p.id in best.by_principle
    }
    top = max(gains, key=lambda id: gains[id])
    return top if gains[top] > 0 else ""


def choose(answers: Sequence[Answer], margin: float, keeps_all: bool) -> tuple[int, int] | None:
    """Best and worst answer of one prompt, or None when they make no usable pair.

    The chosen answer must be finished and no violation of everything; the two must differ in text
    and by at least `margin` in score.
    """
    good = [
        a.score
        if a.finished and not a.kept.unusable and not (keeps_all and a.kept.violated())
        else float("-inf")
        for a in answers
    ]
    best, _ = best_and_worst(good)
    _, worst = best_and_worst([a.score for a in answers])
    apart = answers[best].score - answers[worst].score >= margin
    if good[best] == float("-inf") or not apart or answers[best].text == answers[worst].text:
        return None
    return best, worst


@dataclass(frozen=True)
class Scoring:
    """What an answer's score is made of; see the module's docstring."""

    principles: Principles
    judge: Model | None
    on_topic: float
    relevance_weight: float
    judge_weight: float

    def __call__(self, chunk: Sequence[Row], drawn: list[list[list[object]]]) -> list[list[Answer]]:
        """The answers to each prompt of a chunk, scored."""
        flat: list[Row] = [
            {"prompt": row["prompt"], "completion": text, "finished": finished}
            for row, texts in zip(chunk, drawn, strict=True)
            for text, finished, _ in texts
        ]
        rules = self.principles
        kept = satisfaction(rules, flat, on_topic=self.on_topic, where="principle_pairs")
        values = [
            k.value(rules) + self.relevance_weight * k.relevance + self.judge_weight * v
            for k, v in zip(kept, _judged(self.judge, flat, rules), strict=True)
        ]
        rest = iter(zip(kept, values, strict=True))
        return [
            [Answer(str(t[0]), bool(t[1]), bool(t[2]), *next(rest)) for t in texts]
            for texts in drawn
        ]


def _judged(judge: Model | None, rows: list[Row], principles: Principles) -> list[float]:
    if judge is None:
        return [0.0] * len(rows)
    from truing.core.judge import pointwise

    return pointwise(judge, rows, criteria=principles.as_text())


def pair_row(
    prompt: Row, answers: Sequence[Answer], best: int, worst: int, principles: Principles
) -> Row:
    """A pair with the lineage that `truing why` reads."""
    chosen, rejected = answers[best], answers[worst]
    principle = separating_principle(chosen.kept, rejected.kept, principles)
    lineage = {
        "principle": principle,
        "prompt": prompt["id"],
        "parents": [prompt["id"]],
        "check": principles[principle].check if principle else None,
        "satisfaction": {
            "chosen": chosen.kept.by_principle,
            "rejected": rejected.kept.by_principle,
        },
        "relevance": {"chosen": chosen.kept.relevance, "rejected": rejected.kept.relevance},
        "in_context": {"chosen": chosen.in_context, "rejected": rejected.in_context},
        "rejected_because": rejected.kept.unusable or ", ".join(rejected.kept.violated()),
    }
    return {
        "prompt": prompt["prompt"],
        "chosen": chosen.text,
        "rejected": rejected.text,
        # An answer cut at the length limit must not teach the model about ending its turn.
        "rejected_finished": rejected.finished,
        "score_chosen": round(chosen.score, 6),
        "score_rejected": round(rejected.score, 6),
        "principle": principle,
        "lineage": lineage,
    }


@method(
    needs=("generate",),
    rows={"prompts": ("prompt",)},
    within={
        "k": (2, None),
        "max_tokens": (1, None),
        "temperature": "(0, inf)",
        "top_p": "(0, 1]",
        "on_topic": (-1, 1),
        "relevance_weight": "(-inf, inf)",  # below 0, this and the next count against an answer
        "judge_weight": "(-inf, inf)",
        "margin": (0, None),
        "told": (0, None),
    },
    makes="pair",
)
def principle_pairs(
    model: Model,
    prompts: Table,
    principles: Principles,
    judge: Model | None = None,
    *,
    k: int = 8,
    max_tokens: int = 128,
    temperature: float = 1.0,
    top_p: float = 1.0,
    on_topic: float = ON_TOPIC,
    relevance_weight: float = 0.5,
    judge_weight: float = 0.5,
    margin: float = 0.2,
    keeps_all: bool = False,
    place: Literal["user", "system"] = "user",
    told: int = 0,
) -> Table:
    """Preference pairs from the model's own answers, the best against the worst by the principles.

    Args:
        k: answers sampled per prompt; k // 2 of them see the principles.
        max_tokens: length limit of an answer; a chosen one has ended before it.
        temperature: of sampling.
        top_p: nucleus of sampling.
        on_topic: least cosine of prompt and answer; below it an answer keeps no principle.
        relevance_weight: weight c of that cosine in the score.
        judge_weight: weight j of the judge's verdict, when a judge is given.
        margin: least difference in score of a pair.
        keeps_all: the chosen answer must break no principle.
        place: where the prompt states the principles: after the user's words or as system message.
        told: how many principles, by priority, an answer in context is told; 0 for all. A small
            model heeds one better than four.
    """
    if k < 2:
        raise InputError("needs at least two answers per prompt", where="setting 'k'", seen=k)
    prompts = prompts.expect("prompt", where="synthesize/principle_pairs")
    how = Sampling(k, max_tokens, temperature, top_p, place, told)
    scored = Scoring(principles, judge, on_topic, relevance_weight, judge_weight)
    rows: list[Row] = []
    for chunk, drawn in drawn_answers(model, prompts, principles, how):
        for prompt, answers in zip(chunk, scored(chunk, drawn), strict=True):
            pair = choose(answers, margin, keeps_all)
            if pair is not None:
                rows.append(pair_row(prompt, answers, *pair, principles))
    if not rows:
        raise InputError(
            f"no pair came out of {len(prompts)} prompts with {k} answers each",
            where="synthesize/principle_pairs",
            fix="Sample more answers (k), let them end (max_tokens), or lower the margin",
        )
    made_by = {"generator": model.key, "judge": judge.key if judge else "checks"}
    table = Table("pair", rows, where="principle_pairs")
    return table.with_lineage(**made_by, seed=current().seed, step=current().name)

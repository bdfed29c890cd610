"""How often a model breaks each principle, with Wilson intervals.

For every prompt the model answers; each principle's check decides whether the answer keeps it. The
violation rate of principle i is v_i = (answers with sat_i < 0.5) / n, its 95 % interval Wilson's
score interval. The mean over principles has Wilson's, too, where each answer breaks all, half or
none of them, else a bootstrap interval over prompts. Answers to one prompt go together: intervals
are of prompts, however often each was asked. An empty, repeated or off-topic answer counts as a
violation of every principle. Relevance to the prompt (cosine of sentence vectors) and the length
stand beside, because both can be traded away for adherence. Our own measurement; no paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from truing.context import Json, current
from truing.core.generate import generate
from truing.core.stats import mean_of
from truing.jsontext import plain
from truing.method import method
from truing.models import Model
from truing.principles import Principles
from truing.reports import Measure, Report
from truing.specify.satisfaction import ON_TOPIC, Kept, measured, satisfaction
from truing.specify.texts import words
from truing.tables import Row, Table, as_prompt, content_hash

CHUNK = 128  # prompts answered together: what a kill can cost


def answer_all(
    model: Model,
    prompts: Sequence[Row],
    *,
    max_tokens: int,
    temperature: float,
    top_p: float = 1.0,
    journal: str = "answers",
) -> list[tuple[str, bool]]:
    """(answer, whether it ended by itself) for each prompt; temperature 0 is greedy.

    Finished chunks are read back from the step's journal after a kill.
    """
    context = current()
    drawn_as = [model.key, max_tokens, temperature, top_p, context.seed]

    def name(start: int, chunk: Sequence[Row]) -> str:
        return f"{start}/{content_hash([drawn_as, [r['prompt'] for r in chunk]], 8)}"

    def make(start: int, chunk: Sequence[Row]) -> Json:
        """The answers to a chunk, as the journal keeps them."""
        drawn = generate(
            model,
            [r["prompt"] for r in chunk],
            n=1,
            max_tokens=max_tokens,
            temperature=temperature or 1.0,
            top_p=top_p,
            greedy=temperature == 0,
            seed=context.stream(f"{journal}/{start}"),
        )
        return [[d[0].text.strip(), d[0].finish == "stop"] for d in drawn]

    found = context.chunks(journal, prompts, CHUNK, name, make, "answers")
    return [(str(t), bool(e)) for _, made in found for t, e in cast("list[list[Json]]", made)]


def violation_measures(
    kept: Sequence[Kept], principles: Principles, prompts: Sequence[Row]
) -> list[Measure]:
    """Violation rate over all principles and per principle, each over prompts."""
    asked, rules = [r["prompt"] for r in prompts], measured(principles)

    def rate(name: str, values: Sequence[float], category: str = "") -> Measure:
        return Measure(name, *mean_of(values, asked), "share", category, "lower")

    broken = [k.violated() for k in kept]
    return [
        rate("violation rate", [len(b) / len(rules) for b in broken]),
        *(rate("violation rate", [float(r.id in b) for b in broken], r.id) for r in rules),
        rate("unusable answers", [float(bool(k.unusable)) for k in kept]),
    ]


def sample_rows(
    prompts: Sequence[Row], answers: Sequence[tuple[str, bool]], kept: Sequence[Kept]
) -> list[Row]:
    """The samples behind the report; the lineage leads from each to its prompt and principles."""
    rows: list[Row] = []
    for prompt, (text, finished), k in zip(prompts, answers, kept, strict=True):
        violated = k.violated()
        rows.append(
            {
                "prompt": prompt["prompt"],
                "completion": text,
                "score": 1.0 - len(violated) / max(len(k.by_principle), 1),
                "violated": ", ".join(violated),
                "unusable": k.unusable,
                "relevance": round(k.relevance, 6),
                "words": len(words(text)),
                "finished": finished,
                "lineage": {
                    "prompt": prompt["id"],
                    "parents": [prompt["id"]],
                    "principle": violated[0] if violated else "",
                    "principles": violated,
                },
            }
        )
    return rows


@method(
    needs=("generate",),
    rows={"prompts": ("prompt",)},
    within={
        "max_tokens": (1, None),
        "temperature": (0, None),
        "top_p": "(0, 1]",
        "on_topic": (-1, 1),
    },
)
def adherence(
    model: Model,
    prompts: Table,
    principles: Principles,
    *,
    max_tokens: int = 192,
    temperature: float = 0.7,
    top_p: float = 1.0,
    on_topic: float = ON_TOPIC,
) -> Report:
    """How often a model breaks each principle, with Wilson intervals.

    Args:
        max_tokens: length limit of an answer.
        temperature: of sampling; 0 is greedy.
        top_p: nucleus of sampling.
        on_topic: least cosine of prompt and answer; below it every principle counts as broken.
    """
    rows = [as_prompt(r) for r in prompts.expect("prompt", where="evaluate/adherence")]
    measured(principles, where="evaluate/adherence")
    answers = answer_all(model, rows, max_tokens=max_tokens, temperature=temperature, top_p=top_p)
    asked: list[Row] = [
        {"prompt": r["prompt"], "completion": text, "finished": finished}
        for r, (text, finished) in zip(rows, answers, strict=True)
    ]
    kept = satisfaction(principles, asked, on_topic=on_topic, where="evaluate/adherence")
    measures = violation_measures(kept, principles, rows)
    each = [r["prompt"] for r in rows]
    near = mean_of([k.relevance for k in kept], each, None)
    size = mean_of([float(len(words(a))) for a, _ in answers], each, None)
    measures.append(Measure("relevance", *near, "cosine", "", "higher"))
    measures.append(Measure("words", *size, "words"))
    facts: dict[str, Json] = {
        "kind": "adherence",
        "model": model.name,
        "model_key": model.key,
        "how": {
            "max_tokens": max_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "on_topic": on_topic,
        },
        "checks": {p.id: plain(p.check) for p in measured(principles)},
        "principles": [p.id for p in measured(principles)],
        "texts": {p.id: p.text for p in principles},
        "not_measured": [p.id for p in principles if p.check is None],
    }
    if (n := measures[0].n) < len(rows):
        facts["notes"] = [f"{len(rows)} answers to {n} prompts, which intervals take whole"]
    samples = Table("judgement", sample_rows(rows, answers, kept)).with_lineage(
        generator=model.key, seed=current().seed, step=current().name
    )
    return Report("adherence to principles", measures, samples, facts)

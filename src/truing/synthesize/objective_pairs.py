"""Preference pairs of several objectives at once: the same answers, ranked by each of the rewards.

    r(x, y) = (r_1(x, y), ..., r_H(x, y));   pair i of x:  best against worst of the answers by r_i

The model answers each prompt k times. Each answer has a vector of rewards: rules that verify it
(`rewards`, of which one may give several named values, each an objective), then what reward models
say (`reward_models`). For each objective the best answer that came to its end is set against the
worst, where the two are apart by more than `margin`; `objective` is the number of the objective in
that order, as train/mah_dpo has its heads, and `objective_name` its name. So objectives that are at
odds turn one and the same pair around.

Source: the preference sets, one for each objective, of "Simultaneous Multi-objective Alignment
Across Verifiable and Non-verifiable Rewards", arXiv 2510.01167; best against worst of k as in
synthesize/principle_pairs. Of equal answers the first counts; empty ones are left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import cast

from truing.context import Json, current
from truing.core.generate import generate
from truing.core.judging.rewards import check_reward_model, score_model
from truing.core.judging.scores import check_reward, named_scores
from truing.errors import InputError
from truing.method import method
from truing.models import Model
from truing.tables import Row, Table, as_prompt, content_hash

WHERE = "synthesize/objective_pairs"
CHUNK = 32  # prompts of a journal entry: what a kill can cost
Refs = Mapping[str, dict[str, object]]


def best_and_worst(
    scores: Sequence[float], finished: Sequence[bool], margin: float
) -> tuple[int, int] | None:
    """Numbers of the best answer that came to its end and of the worst; None if too near."""
    ended = [i for i, end in enumerate(finished) if end]
    if not ended:
        return None
    best = max(ended, key=lambda i: (scores[i], -i))
    worst = min(range(len(scores)), key=lambda i: (scores[i], i))
    return (best, worst) if scores[best] - scores[worst] > margin else None


def vectors(rows: list[Row], refs: Refs, models: Mapping[str, Model]) -> dict[str, list[float]]:
    """The score of each row by the name of each objective, in their order."""
    made: dict[str, list[float]] = {}
    for name, ref in refs.items():
        made |= named_scores(name, ref, rows, where=f"{WHERE} setting 'rewards' {name!r}")
    for name, model in models.items():
        made[name] = score_model(model, rows)
    return made


def _drawn(
    model: Model, prompts: Sequence[Row], k: int, max_tokens: int, temperature: float
) -> Iterator[tuple[Sequence[Row], list[list[tuple[str, bool]]]]]:
    """Chunks of prompts with (text, whether it came to its end) of k answers each."""
    context = current()
    draw = [model.key, k, max_tokens, temperature, context.seed]

    def name(start: int, chunk: Sequence[Row]) -> str:
        return content_hash([draw, start, [r["prompt"] for r in chunk]], 8)

    def make(start: int, chunk: Sequence[Row]) -> Json:
        drawn = generate(
            model,
            [r["prompt"] for r in chunk],
            n=k,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=context.stream(f"answers/{start}"),
        )
        return [[[c.text.strip(), c.finish == "stop"] for c in items] for items in drawn]

    for chunk, made in context.chunks("answers", prompts, CHUNK, name, make, "answers"):
        yield chunk, cast("list[list[tuple[str, bool]]]", made)


def _pairs(
    prompt: Row,
    answers: Sequence[tuple[str, bool]],
    scores: Mapping[str, Sequence[float]],
    margin: float,
) -> Iterator[Row]:
    """One pair for each objective by which the answers are far enough apart."""
    texts, finished = zip(*answers, strict=True)
    for number, (name, values) in enumerate(scores.items()):
        places = best_and_worst(values, finished, margin)
        if places is None or texts[places[0]] == texts[places[1]]:
            continue
        best, worst = places
        rewards = {n: {"chosen": v[best], "rejected": v[worst]} for n, v in scores.items()}
        yield {
            "prompt": prompt["prompt"],
            "chosen": texts[best],
            "rejected": texts[worst],
            # An answer cut at the length limit must not teach the model about ending its turn.
            "rejected_finished": finished[worst],
            "score_chosen": values[best],
            "score_rejected": values[worst],
            "objective": number,
            "objective_name": name,
            "lineage": {"prompt": prompt["id"], "parents": [prompt["id"]], "rewards": rewards},
        }


@method(
    paper="mah-dpo",
    needs=("generate",),
    rows={"prompts": ("prompt",)},
    within={
        "k": (2, None),
        "max_tokens": (1, None),
        "temperature": "(0, inf)",
        "margin": (0, None),
    },
    makes="pair",
)
def objective_pairs(
    model: Model,
    prompts: Table,
    reward_models: dict[str, Model] | None = None,
    *,
    rewards: dict[str, dict[str, object]],
    k: int = 8,
    max_tokens: int = 128,
    temperature: float = 1.0,
    margin: float = 0.0,
) -> Table:
    """Preference pairs of several objectives at once, from answers with vectors of rewards.

    Args:
        rewards: rewards or checks by the name of their objective; {} for reward models alone.
        k: answers drawn to each prompt.
        max_tokens: length limit of an answer.
        temperature: of drawing.
        margin: least difference of two answers' scores that is passed over.
    """
    models = reward_models or {}
    if not rewards and not models:
        raise InputError("there is no objective", where=WHERE, fix="Give rewards or reward_models")
    if both := sorted(rewards.keys() & models.keys()):
        raise InputError(
            "two objectives have one name", where=WHERE, seen=both, fix="Rename one of them"
        )
    for name, ref in rewards.items():
        check_reward(ref, where=f"{WHERE} setting 'rewards' {name!r}")
    for reward_model in models.values():
        check_reward_model(reward_model, WHERE)
    asked = [as_prompt(r) for r in prompts.expect("prompt", where=WHERE)]
    rows: list[Row] = []
    empty = 0
    for chunk, drawn in _drawn(model, asked, k, max_tokens, temperature):
        # An empty answer keeps most rules, and would teach to say nothing.
        said = [[(text, ended) for text, ended in items if text] for items in drawn]
        empty += sum(map(len, drawn)) - sum(map(len, said))
        flat: list[Row] = [
            {**row, "prompt": row["prompt"], "completion": text, "finished": ended}
            for row, items in zip(chunk, said, strict=True)
            for text, ended in items
        ]
        scores = {n: iter(v) for n, v in vectors(flat, rewards, models).items()} if flat else {}
        for row, items in zip(chunk, said, strict=True):
            own = {n: [next(v) for _ in items] for n, v in scores.items()}
            rows += _pairs(row, items, own, margin) if items else ()
    counts = Counter(f"pairs_{r['objective_name']}" for r in rows)
    current().metric(prompts=len(asked), pairs=len(rows), empty_answers=empty, **counts)
    if not rows:
        raise InputError(
            f"no objective tells the {k} answers to any of {len(asked)} prompts apart",
            where=WHERE,
            fix="Draw more answers (k), longer ones (max_tokens), or lower the margin",
        )
    told = {"generator": model.key, "seed": current().seed, "step": current().name}
    return Table("pair", rows, where="objective pairs").with_lineage(**told)

"""One head for each of two objectives: does each serve its own, and do blends go between them?

A two-layer decoder learns to answer by a little grammar: 3 to 14 words, one in four of which is a
colour. Two objectives that are at odds: brevity (at most 7 words) and detail (three colours or
more). 150 pairs each, of answers by the grammar of which one only meets the objective. MAH-DPO
trains both heads on all 300 for four passes; DPO on the same pairs shuffled, with the same weights,
updates and rate. Scores are shares of four answers to each of 60 prompts never trained on.

A process reward model for each objective reads states of the model before: brevity as what can be
verified, from four roll-outs of each word of 60 answers; detail as what cannot, from the share of
the colours that each of 300 answers named in the end, in hindsight. They guide that model
three words at a time, five candidates each, with weights of one objective, of the other and of
both; with both they guide the equal blend of the heads, too.

Effect: how far a head raises the score of its own objective above that of the model before, the
less of the two, for each of three seeds. The claim asks for 0.15; for scores that follow the weight
in five steps from one head to the other (Spearman 0.9, of the mean over seeds); for a worse score
of the equal blend at most 0.02 below that of DPO; and for 0.05 more of an objective's score where
its process rewards guide the decoding, by the same sampling (of the mean over seeds, the less of
the two). The process rewards' settings were chosen on other seeds.
"""

from __future__ import annotations

import random
from typing import Any, cast

from _tiny import Outcome, Row, Table, blank, call, drawn, step, taught, vocabulary

from truing.core.stats import spearman
from truing.method import methods
from truing.models import Model

TITLE = "Each head serves its own objective, and blends of heads go from one to the other"
METHOD = "train/mah_dpo"
MODEL = "a decoder of 0.12M, from nothing"
EFFECT = "rise of the score of a head's own objective over the model before, the less of two heads"
MARGIN = 0.15
MINUTES = 4
NEEDS_GPU = False
SEEDS = (0, 1, 2)
SHARES = (1.0, 0.75, 0.5, 0.25, 0.0)  # of the head for brevity
HOW: dict[str, Any] = {"epochs": 4, "lr": 1e-3, "rank": 0, "batch": 20, "beta": 0.1}
TOPICS = ("rain", "bread", "boats", "birds", "clocks", "trees", "shoes", "rivers", "songs", "lamps")
FORMS = ("tell me about {}", "what of {}", "say something on {}", "and the {}", "why {}", "how {}")
WORDS = ["they", "are", "often", "old", "and", "fine", "near", "the", "small", "town", "where",
         "we", "once", "saw", "some", "of", "them", "in", "spring", "or", "late", "autumn", "when",
         "days", "grow", "short"]  # fmt: skip
COLOURS = ["red", "blue", "green", "brown", "white", "black", "grey", "yellow"]
OBJECTIVES = ("brevity", "detail")
GUIDES = ((1.0, 0.0), (0.5, 0.5), (0.0, 1.0))  # weights of the process rewards
STEPS = {"separator": " ", "stops": ["\n\n"], "step_tokens": 3, "top_k": 0}


def answer(source: random.Random, topic: str) -> str:
    words = [source.choice(COLOURS if source.random() < 0.25 else WORDS)
             for _ in range(source.randint(2, 13))]  # fmt: skip
    return " ".join([topic, *words])


def meets(text: str) -> tuple[bool, bool]:
    """Whether an answer is brief, and whether it is detailed."""
    words = text.split()
    return 0 < len(words) <= 7, len(set(words) & set(COLOURS)) >= 3


def pairs(source: random.Random, objective: int, n: int) -> list[Row]:
    rows: list[Row] = []
    while len(rows) < n:
        topic = source.choice(TOPICS)
        worse, better = sorted(
            (answer(source, topic) for _ in range(2)), key=lambda t: meets(t)[objective]
        )
        if meets(worse)[objective] < meets(better)[objective]:
            prompt = source.choice(FORMS[:4]).format(topic)
            rows.append({"prompt": prompt, "chosen": better, "rejected": worse,
                         "objective": objective})  # fmt: skip
    return rows


def scores(model: Model, seed: int) -> list[float]:
    """Share of answers to the held-out forms that meet each objective."""
    asked = [f.format(t) for f in FORMS[4:] for t in TOPICS] * 3
    met = [meets(t) for texts in drawn(model, asked, seed=seed, n=4) for t in texts]
    return [sum(m[i] for m in met) / len(met) for i in range(len(OBJECTIVES))]


def process_rewards(before: Model, source: random.Random, seed: int) -> dict[str, Model]:
    """A value model for each objective, by one recipe: labelled steps, then a head."""
    answers = [
        {"prompt": source.choice(FORMS[:4]).format(topic), "completion": answer(source, topic)}
        for topic in source.choices(TOPICS, k=300)
    ]
    how: dict[str, Any] = {"separator": " ", "max_tokens": 16, "seed": seed}
    verified = call("step_labels", before, Table("example", answers[:60]),
                    reward={"use": "max_words", "n": 7}, rollouts=4, **how)  # fmt: skip
    liked = call("step_labels", before, Table("example", answers), rollouts=0,
                 reward={"use": "keyword_coverage", "words": COLOURS}, **how)  # fmt: skip
    return {
        name: call("step_value", before, labelled, seed=seed, epochs=epochs, lr=2e-3)
        for name, labelled, epochs in (("brevity", verified, 40), ("detail", liked, 20))
    }


def guided(
    model: Model, rewards: dict[str, Model], shares: tuple[float, float], seed: int
) -> list[float]:
    """Both scores where process rewards of these weights choose the steps."""
    weights = dict(zip(OBJECTIVES, shares))
    how: dict[str, Any] = {"weights": weights, "standardise": True, **STEPS}
    with step(seed):
        led = methods["prm_guided"](model, process_models=rewards, **how)
        return scores(cast(Model, led), seed)


def one(words: list[str], seed: int) -> dict[str, list[list[float]]]:
    """Both scores of the model before, of DPO and of every blend."""
    source = random.Random(seed)
    said: list[Row] = []
    for _ in range(1500):
        topic = source.choice(TOPICS)
        asked = source.choice(FORMS).format(topic)
        said.append({"prompt": asked, "completion": answer(source, topic)})
    before = taught(blank(words, seed), said, seed)
    rows = [*pairs(source, 0, 150), *pairs(source, 1, 150)]
    data = Table("pair", source.sample(rows, len(rows)))
    union = call("dpo", before, data, seed=seed, **HOW)
    with step(seed):
        heads = methods["mah_dpo"](before, data, objectives=2, **HOW)
        made = [methods["blend_heads"](heads, weights=[w, 1 - w]) for w in SHARES]
        blends = cast("list[Model]", made)
        after = [scores(m, seed) for m in blends]
    rewards = process_rewards(before, source, seed)
    return {
        "before": [scores(before, seed)], "dpo": [scores(union, seed)], "blends": after,
        "before, guided": [guided(before, rewards, w, seed) for w in GUIDES],
        "equal blend, guided": [guided(blends[2], rewards, (0.5, 0.5), seed)],
    }  # fmt: skip


def run() -> Outcome:
    words = vocabulary([*WORDS, *COLOURS, *TOPICS, *FORMS])
    every = [one(words, seed) for seed in SEEDS]

    def mean(name: str, place: int, objective: int) -> float:
        return sum(e[name][place][objective] for e in every) / len(every)

    curves = [[mean("blends", i, k) for i in range(len(SHARES))] for k in range(2)]
    order = [spearman(SHARES, curves[0]), -spearman(SHARES, curves[1])]
    rises = [
        [e["blends"][place][k] - e["before"][0][k] for k, place in enumerate((0, -1))]
        for e in every
    ]
    worse = {n: min(mean(n, p, k) for k in range(2)) for n, p in (("blends", 2), ("dpo", 0))}
    guide = [
        mean("before, guided", place, k) - mean("before", 0, k) for k, place in enumerate((0, -1))
    ]
    return Outcome(
        effects=[min(r) for r in rises],
        seeds=SEEDS,
        holds={
            "scores follow the weight": min(order) >= 0.9,
            "worse score of the equal blend within 0.02 of DPO": (
                worse["blends"] >= worse["dpo"] - 0.02
            ),
            "guided by its process rewards, each score 0.05 above": min(guide) >= 0.05,
        },
        figures={
            "objectives": list(OBJECTIVES),
            "rises of each head's own": rises,
            "weight of the head for brevity": list(SHARES),
            "scores along the weights": curves,
            "worse score, equal blend and DPO": [worse["blends"], worse["dpo"]],
            "rises where process rewards guide the model before": guide,
            "weights of the process rewards": [list(w) for w in GUIDES],
            "scores of the model before, guided": [
                [mean("before, guided", i, k) for i in range(len(GUIDES))] for k in range(2)
            ],
            "scores of the equal blend, guided by both": [
                mean("equal blend, guided", 0, k) for k in range(2)
            ],
            "every": list(every),
        },
    )

"""Do absolute scores beside pairs teach a reward model what pairs alone cannot say?

A closed world: answers describe a topic with three of 16 words. An answer's quality is
sigmoid(topic + words): every topic is worth something, and so is every word, both drawn anew for
each seed. Both answers of a pair share the prompt, so that the topic's part never decides between
them. 600 pairs; one label in five of the half with the smaller gap is wrong; annotated scores have
a deviation of 0.05. A tiny decoder that speaks this grammar becomes a reward model in 100 updates,
by the pairs alone (Bradley-Terry) or by the report's loss with alpha = 1.

Effect: correlation (Pearson) of the rewards of 600 new answers with their quality, less that under
Bradley-Terry. The claim asks for 0.1, for an accuracy of new pairs at most 0.02 lower and for less
of a gap between training and new pairs, both with labels as noisy.

Not part of this: merging, reinforcement and the parts of the report that make data.
"""

from __future__ import annotations

import math
import random
from statistics import correlation, mean

from _tiny import FORMS, TOPICS, Outcome, Row, Table, blank, call, taught, vocabulary

from truing.core.judging.rewards import score_model
from truing.models import Model

TITLE = "Absolute scores beside pairs teach a reward model the gaps that pairs do not show"
METHOD = "train/absolute_scores"
MODEL = "a decoder of 0.12M, from nothing"
EFFECT = "Pearson correlation of reward and quality, alpha = 1 less Bradley-Terry"
MARGIN = 0.1
MINUTES = 2
NEEDS_GPU = False
SEEDS = (0, 1, 2)
WORDS = [
    "calm", "loud", "clean", "dusty", "green", "bare", "lively", "empty", "old", "new", "wide",
    "narrow", "bright", "dark", "famous", "quiet",
]  # fmt: skip
SAID, PAIRS, HELD = 1000, 600, 300
WRONG, SPREAD = 0.2, 0.05  # labels of the closer half, deviation of annotated scores
REWARD = {"rank": 0, "steps": 100, "lr": 1e-3, "batch": 32}
Pair = tuple[str, str, str]


class World:
    """One seed's qualities and texts."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.source = random.Random(f"baichuan_alignment/{seed}")
        self.topic = {t: self.source.gauss(0, 1) for t in TOPICS}
        self.word = {w: self.source.gauss(0, 1) for w in WORDS}

    def asked(self) -> tuple[str, str]:
        """A prompt and its topic."""
        topic = self.source.choice(TOPICS)
        return self.source.choice(FORMS).format(topic), topic

    def described(self, topic: str) -> str:
        return f"the {topic} is {' and '.join(self.source.sample(WORDS, 3))} ."

    def words_part(self, text: str) -> float:
        return sum(self.word.get(w, 0.0) for w in text.split()) / math.sqrt(3)

    def quality(self, prompt: str, text: str) -> float:
        return 1 / (1 + math.exp(-self.topic[prompt.split()[-1]] - self.words_part(text)))

    def pairs(self, n: int) -> list[Pair]:
        """Prompts with two answers each, the better one first."""
        made: list[Pair] = []
        while len(made) < n:
            prompt, topic = self.asked()
            one, two = self.described(topic), self.described(topic)
            gap = self.quality(prompt, one) - self.quality(prompt, two)
            if gap:
                made.append((prompt, one, two) if gap > 0 else (prompt, two, one))
        return made

    def labelled(self, pairs: list[Pair]) -> list[Row]:
        """Pairs with noisy labels and annotated scores."""
        gaps = [self.quality(p, a) - self.quality(p, b) for p, a, b in pairs]
        middle = sorted(gaps)[len(gaps) // 2]
        rows: list[Row] = []
        for (prompt, one, two), gap in zip(pairs, gaps):
            if gap < middle and self.source.random() < WRONG:
                one, two = two, one
            rows.append({"prompt": prompt, "chosen": one, "rejected": two,
                         "score_chosen": self.annotated(prompt, one),
                         "score_rejected": self.annotated(prompt, two)})  # fmt: skip
        return rows

    def annotated(self, prompt: str, text: str) -> float:
        return min(max(self.quality(prompt, text) + self.source.gauss(0, SPREAD), 0.0), 1.0)


def accuracy(model: Model, rows: list[Row]) -> float:
    """Share of pairs whose chosen answer has the larger reward."""
    sides = [
        score_model(model, [{"prompt": r["prompt"], "completion": r[name]} for r in rows])
        for name in ("chosen", "rejected")
    ]
    return mean(float(c > r) for c, r in zip(*sides))


def judged(
    world: World, model: Model, held: list[Pair], rows: list[Row], new: list[Row]
) -> dict[str, float]:
    """How well a reward model knows qualities and pairs never seen, and noisy pairs of both."""
    items: list[Row] = [{"prompt": p, "completion": t} for p, *both in held for t in both]
    wanted = [world.quality(str(r["prompt"]), str(r["completion"])) for r in items]
    clean: list[Row] = [{"prompt": p, "chosen": a, "rejected": b} for p, a, b in held]
    return {
        "pearson": correlation(score_model(model, items), wanted),
        "accuracy": accuracy(model, clean),
        "gap of noisy pairs": accuracy(model, rows) - accuracy(model, new),
    }


def one(seed: int) -> dict[str, dict[str, float]]:
    world = World(seed)
    words = vocabulary([*FORMS, *TOPICS, *WORDS, "the is and ."])
    asked = [world.asked() for _ in range(SAID)]
    said: list[Row] = [{"prompt": p, "completion": world.described(t)} for p, t in asked]
    base = taught(blank(words, seed), said, seed)
    rows, held = world.labelled(world.pairs(PAIRS)), world.pairs(HELD)
    new = world.labelled(held)
    found: dict[str, dict[str, float]] = {}
    for name in ("bradley_terry", "absolute_scores"):
        reward = call(f"train/{name}", base, Table("pair", rows), seed=seed, **REWARD)
        found[name] = judged(world, reward, held, rows, new)
    return found


def run() -> Outcome:
    found = [one(seed) for seed in SEEDS]

    def rise(name: str) -> list[float]:
        return [f["absolute_scores"][name] - f["bradley_terry"][name] for f in found]

    return Outcome(
        effects=rise("pearson"),
        seeds=SEEDS,
        holds={
            "accuracy of new pairs at most 0.02 lower": mean(rise("accuracy")) >= -0.02,
            "less of a gap between training and new pairs": mean(rise("gap of noisy pairs")) < 0,
        },
        figures={
            arm: {n: [round(f[arm][n], 4) for f in found] for n in found[0][arm]}
            for arm in found[0]
        },
    )

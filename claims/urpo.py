"""Does a model that learns to grade teach itself what it was never told to say?

A tiny decoder, trained from nothing, adds one-digit numbers with one answer in ten wrong, talks
about topics, saying thanks in three answers of ten, knows which of two candidates says thanks when
asked for that, and grades two candidates by numbers from 1 to 10 that mean next to nothing: in its
examples the better candidate has the higher grade in 60 of 100, since a policy gradient can only
make more of what is there. URPO trains it on 128 sums and 128 pairs of candidates whose gold score
is whether they say thanks (a warm-up of 250 rollouts), then on these and 128 open requests
without any score (60 rollouts): six rows of each sort a rollout on average, eight answers to each.
Beside it the same sums and requests without the pairs: the model grades itself too, but nothing
teaches it to. That referee is untaught. One that is frozen, the base as it was at the start, has no
run here: greedily, as the reward `referee` asks it, a base on seed 3 gave grades that could be read
to 8 of 48 answers.

The effect is the rise of the share of thankful answers to 40 requests that were not trained on. The
claim asks for 0.10; for 0.65 of 200 other pairs in the right order, by grades drawn as those of the
model's own answers are; for 0.03 over the run whose referee learns nothing, which is a direction,
not a gate; and for sums to lose at most 0.03. Among the figures is whether the base can do what the
claim builds on: sums, grades that can be read, which of two candidates says thanks.

A first try with 100 and 40 rollouts, on seeds 0, 1 and 2, was too short for two of its three
referees to learn (0.51, 0.47 and 0.98 of the pairs in order; effects 0.125, -0.05 and 0.60). The
numbers of rollouts were then chosen on seeds from 100 on.
"""

from __future__ import annotations

import random
from statistics import mean
from typing import Any

from _tiny import FORMS, TOPICS, Outcome, Row, Table, blank, call, drawn, taught, vocabulary

from truing.core.judging.referee import kendall, read_scores, referee_prompt
from truing.models import Model

TITLE = "A model that learns to grade teaches itself by its own grades"
METHOD = "train/urpo"
MODEL = "a decoder of 0.12M, from nothing"
EFFECT = "rise of the share of answers to open requests that keep a rule which only pairs showed"
MARGIN = 0.10
MINUTES = 10
NEEDS_GPU = False
SEEDS = (3, 4, 5)
SUMS, SETS, OPEN, PAIRS = 128, 128, 128, 200  # in the three pools, and pairs held out
WARM, ROLLOUTS, BATCH, LR, BETA, TOKENS = 250, 60, 18, 3e-4, 0.05, 16
TAUGHT = 1200  # examples of grades, and as many of saying which candidate it is
THANKFUL, WRONG, IN_ORDER = 0.3, 0.1, 0.6
CRITERIA = "it says thanks"
WHICH = "which candidate says thanks"
LOOKS = [
    "kind", "warm", "bright", "round", "square", "long", "short", "wide", "narrow", "grey",
    "flat", "even",
]  # fmt: skip
Pair = tuple[str, list[str], list[float]]


def said(source: random.Random, topic: str, *, thanks: bool) -> str:
    text = f"the {topic} is {source.choice(LOOKS)} and {source.choice(LOOKS)}"
    return f"{text} thanks" if thanks else text


def added(source: random.Random) -> tuple[str, int]:
    a, b = source.randrange(10), source.randrange(10)
    return f"add {a} and {b}", a + b


def candidates(source: random.Random, asked: tuple[str, str]) -> Pair:
    """A request, an answer that says thanks and one that does not, and their gold scores."""
    prompt, topic = asked
    gold = [0.0, 1.0]
    source.shuffle(gold)
    return prompt, [said(source, topic, thanks=bool(g)) for g in gold], gold


def graded(source: random.Random, gold: list[float]) -> str:
    """Two grades, the better candidate's the higher one a little more often than not."""
    low, high = sorted(source.sample(range(1, 11), 2))
    best = gold.index(1.0) if source.random() < IN_ORDER else gold.index(0.0)
    return f"[{high}, {low}]" if best == 0 else f"[{low}, {high}]"


class World:
    """One seed's base model, its three pools and what is held out of them."""

    def __init__(self, seed: int) -> None:
        self.seed, self.source = seed, random.Random(f"urpo/{seed}")
        asked = [(form.format(topic), topic) for topic in TOPICS for form in FORMS]
        self.source.shuffle(asked)
        self.known, self.other = asked[: len(asked) // 2], asked[len(asked) // 2 :]
        rows = self.lessons(asked)
        texts = [str(r[n]) for r in rows for n in ("prompt", "completion")]
        words = vocabulary([*texts, *LOOKS, *map(str, range(19))])
        self.base = taught(blank(words, seed), rows, seed, epochs=4)
        self.other_sums = [added(self.source) for _ in range(100)]
        self.pairs = [candidates(self.source, self.source.choice(self.other)) for _ in range(PAIRS)]
        self.sums, self.sets, self.open = self.pools()

    def lessons(self, asked: list[tuple[str, str]]) -> list[Row]:
        """What the base is taught."""
        source, rows = self.source, list[tuple[str, str]]()
        for prompt, topic in asked * 12:
            rows.append((prompt, said(source, topic, thanks=source.random() < THANKFUL)))
        for _ in range(4000):
            prompt, total = added(source)
            total = source.randrange(19) if source.random() < WRONG else total
            rows.append((prompt, f"sum {total}"))
        for _ in range(TAUGHT):
            prompt, texts, gold = candidates(source, source.choice(asked))
            rows.append((referee_prompt(prompt, texts, CRITERIA), graded(source, gold)))
            prompt, texts, gold = candidates(source, source.choice(asked))
            shown = f"{WHICH} {referee_prompt(prompt, texts, CRITERIA)}"
            rows.append((shown, f"number {gold.index(1.0) + 1}"))
        return [{"prompt": p, "completion": c} for p, c in rows]

    def pools(self) -> tuple[list[Row], list[Row], list[Row]]:
        """Sums, pairs with gold scores, and open requests; all runs have the same."""
        sums: list[Row] = []
        for _ in range(SUMS):
            prompt, total = added(self.source)
            sums.append({"prompt": prompt, "answer": total})
        sets: list[Row] = []
        for _ in range(SETS):
            prompt, texts, gold = candidates(self.source, self.source.choice(self.known))
            sets.append({"prompt": prompt, "completions": texts, "scores": gold})
        return sums, sets, [{"prompt": p} for p, _ in self.source.choices(self.known, k=OPEN)]

    def how(self, rows: list[Row], rollouts: int) -> dict[str, Any]:
        """Settings of a run, which sees as many rows of each pool a rollout, on average, as any."""
        return {
            "seed": self.seed, "rank": 0, "lr": LR, "beta": BETA, "answers": 8, "steps": rollouts,
            "batch": round(BATCH * len(rows) / (SUMS + SETS + OPEN)), "max_tokens": TOKENS,
        }  # fmt: skip

    def graded_by_itself(self, model: Model, rows: list[Row], rollouts: int) -> Model:
        """After URPO: open requests among these rows are graded by the model as it is then."""
        return call(
            "train/urpo", model, Table("prompt", rows), self.base, criteria=CRITERIA, chunk=2,
            **self.how(rows, rollouts),
        )  # fmt: skip

    def runs(self) -> dict[str, Model]:
        """The base, and what each run makes of it."""
        warm = self.graded_by_itself(self.base, self.sums + self.sets, WARM)
        untaught = self.graded_by_itself(self.base, self.sums, WARM)
        rows = self.sums + self.sets + self.open
        return {
            "base": self.base,
            "urpo": self.graded_by_itself(warm, rows, ROLLOUTS),
            "untaught referee": self.graded_by_itself(untaught, self.sums + self.open, ROLLOUTS),
        }

    def measured(self, model: Model) -> dict[str, float]:
        """Shares of answers that are as they should be."""
        how: dict[str, Any] = {"seed": self.seed, "max_tokens": TOKENS}
        open_ = drawn(model, [p for p, _ in self.other], n=8, **how)
        sums = drawn(model, [p for p, _ in self.other_sums], greedy=True, **how)
        shown = [referee_prompt(p, texts, CRITERIA) for p, texts, _ in self.pairs]
        grades = drawn(model, shown, n=4, **how)
        which = drawn(model, [f"{WHICH} {s}" for s in shown], greedy=True, **how)
        golds = [gold for _, _, gold in self.pairs]
        read = [(read_scores(t, 2), g) for several, g in zip(grades, golds) for t in several]
        return {
            "thankful": mean(float("thanks" in t.split()) for several in open_ for t in several),
            "pairs in order": mean((kendall(s, g) + 1) / 2 if s else 0.0 for s, g in read),
            "grades that can be read": mean(float(s is not None) for s, _ in read),
            "knows which": mean(
                float(t.split()[-1:] == [str(g.index(1.0) + 1)]) for (t,), g in zip(which, golds)
            ),
            "sums": mean(
                float(t.split()[-1:] == [str(total)])
                for (t,), (_, total) in zip(sums, self.other_sums)
            ),
        }


def one(seed: int) -> dict[str, dict[str, float]]:
    world = World(seed)
    return {name: world.measured(model) for name, model in world.runs().items()}


def run() -> Outcome:
    found = [one(seed) for seed in SEEDS]
    mid = {n: {m: mean(f[n][m] for f in found) for m in found[0][n]} for n in found[0]}
    return Outcome(
        effects=[f["urpo"]["thankful"] - f["base"]["thankful"] for f in found],
        seeds=SEEDS,
        holds={
            "0.65 of other pairs graded in order": mid["urpo"]["pairs in order"] >= 0.65,
            "more than with an untaught referee": mid["urpo"]["thankful"]
            > mid["untaught referee"]["thankful"],
            "sums lose at most 0.03": mid["urpo"]["sums"] >= mid["base"]["sums"] - 0.03,
        },
        figures={
            name: {n: [round(f[name][n], 4) for f in found] for n in found[0][name]}
            for name in found[0]
        },
    )

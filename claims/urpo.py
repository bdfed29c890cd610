"""Does a model that learns to grade from pairs teach itself what it was never told to say?

A tiny decoder, trained from nothing, adds one-digit numbers with one answer in ten wrong, talks
about topics, saying thanks in three answers of ten, knows which of two candidates says thanks when
asked for that, and grades candidates by numbers that mean nothing. URPO then mixes 32 sums, 64
pairs of candidates whose gold score is whether they say thanks, and 64 open requests without any:
nine rows and eight answers to each a rollout, 80 rollouts. Beside it the same without the pairs:
the model grades, but nothing teaches it to.

The effect is the rise of the share of thankful answers to 96 open requests about other topics. The
card asks for 0.10; for 0.65 of 200 other pairs graded in the right order; for 0.03 over the run
whose referee learns nothing, which is a direction, not a gate; and for sums to lose at most 0.03.
"""

from __future__ import annotations

import random
from statistics import mean

from _tiny import FORMS, TOPICS, Outcome, Row, Table, blank, call, drawn, taught, vocabulary

from truing.core.referee import read_scores, referee_prompt
from truing.models import Model

TITLE = "A model that learns to grade teaches itself by its own grades"
METHOD = "train/urpo"
EFFECT = "rise of the share of answers to open requests that keep a rule which only pairs showed"
MARGIN = 0.10
MINUTES = 4
NEEDS_GPU = False
SEEDS = (0, 1, 2)
ROLLOUTS, LR = 80, 3e-4
SUMS, SETS, OPEN, PAIRS = 32, 64, 64, 200
CRITERIA = "it says thanks"
LOOKS = [
    "kind", "warm", "bright", "round", "square", "long", "short", "wide", "narrow", "grey",
    "flat", "even",
]  # fmt: skip


def said(source: random.Random, topic: str, *, thanks: bool) -> str:
    text = f"the {topic} is {source.choice(LOOKS)} and {source.choice(LOOKS)}"
    return f"{text} thanks" if thanks else text


def thankful(text: str) -> float:
    return float("thanks" in text.split())


def added(source: random.Random) -> tuple[str, int]:
    a, b = source.randrange(10), source.randrange(10)
    return f"add {a} and {b}", a + b


class World:
    """One seed's base model, its three pools and what is held out of them."""

    def __init__(self, seed: int) -> None:
        self.seed, self.source = seed, random.Random(f"urpo/{seed}")
        source = self.source
        asked = [(form.format(topic), topic) for topic in TOPICS for form in FORMS]
        source.shuffle(asked)
        self.known, self.other = asked[: len(asked) // 2], asked[len(asked) // 2 :]
        rows: list[Row] = []
        for prompt, topic in asked * 6:
            text = said(source, topic, thanks=source.random() < 0.3)
            rows.append({"prompt": prompt, "completion": text})
        for _ in range(600):
            prompt, total = added(source)
            total = source.randrange(19) if source.random() < 0.1 else total
            rows.append({"prompt": prompt, "completion": f"sum {total}"})
        for _ in range(240):
            grades = [str(source.randint(1, 10)) for _ in range(2)]
            prompt, texts, gold = self.candidates(source.choice(asked))
            shown = referee_prompt(prompt, texts, CRITERIA)
            rows.append({"prompt": shown, "completion": f"[{', '.join(grades)}]"})
            only = shown.partition("Instruction:")[2].partition("Think first")[0]
            which = f"{only} which candidate says thanks"
            rows.append({"prompt": which, "completion": f"number {gold.index(1.0) + 1}"})
        texts = [str(r[n]) for r in rows for n in ("prompt", "completion")]
        words = vocabulary([*texts, *LOOKS, *map(str, range(19)), "thanks sum"])
        self.base = taught(blank(words, seed), rows, seed, epochs=8)
        self.sums = [added(source) for _ in range(100)]
        self.pairs = [self.candidates(source.choice(self.other)) for _ in range(PAIRS)]

    def candidates(self, asked: tuple[str, str]) -> tuple[str, list[str], list[float]]:
        """A request, an answer that says thanks and one that does not, and their gold scores."""
        prompt, topic = asked
        gold = [0.0, 1.0]
        self.source.shuffle(gold)
        return prompt, [said(self.source, topic, thanks=bool(g)) for g in gold], gold

    def pools(self, *, referee: bool) -> Table:
        rows: list[Row] = []
        for _ in range(SUMS):
            prompt, total = added(self.source)
            rows.append({"prompt": prompt, "answer": total})
        for _ in range(SETS if referee else 0):
            prompt, texts, gold = self.candidates(self.source.choice(self.known))
            rows.append({"prompt": prompt, "completions": texts, "scores": gold})
        rows += [{"prompt": p} for p, _ in self.source.choices(self.known, k=OPEN)]
        return Table("prompt", rows)

    def trained(self, *, referee: bool) -> Model:
        data = self.pools(referee=referee)
        return call(
            "train/urpo", self.base, data, seed=self.seed, rank=0, lr=LR, answers=8, new_tokens=16,
            batch=round(9 * len(data) / (SUMS + SETS + OPEN)), steps=ROLLOUTS, criteria=CRITERIA,
            chunk=2,
        )  # fmt: skip

    def measured(self, model: Model) -> dict[str, float]:
        open_ = drawn(model, [p for p, _ in self.other], n=4, seed=self.seed, max_tokens=16)
        sums = drawn(model, [p for p, _ in self.sums], greedy=True, max_tokens=8)
        asked = [referee_prompt(p, texts, CRITERIA) for p, texts, _ in self.pairs]
        graded = drawn(model, asked, greedy=True, max_tokens=16)
        right: list[float] = []
        for (text,), (_, _, gold) in zip(graded, self.pairs):
            scores = read_scores(text, 2)
            order = 0.0 if scores is None else (scores[0] - scores[1]) * (gold[0] - gold[1])
            right.append(0.5 if order == 0 else float(order > 0))
        return {
            "thankful": mean(thankful(t) for several in open_ for t in several),
            "pairs in order": mean(right),
            "sums": mean(
                float(t.split()[-1:] == [str(total)]) for (t,), (_, total) in zip(sums, self.sums)
            ),
        }


def one(seed: int) -> dict[str, dict[str, float]]:
    world = World(seed)
    models = {
        "base": world.base,
        "urpo": world.trained(referee=True),
        "untaught referee": world.trained(referee=False),
    }
    return {name: world.measured(model) for name, model in models.items()}


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

"""Does feeding agreement back to the ranker beat learning from its rankings once?

The white box is a tiny decoder that answers with six words, drawn at random from friendly, plain
and rude ones; the true reward is the mean of +1, 0 and -1 over them. The black box is simulated: it
knows the true order, but takes the wrong side in each comparison of two answers with probability
0.35, which falls to 0.15 as the examples that it is shown and that are truly in order go from none
to ten. CycleAlign (three cycles, RRHF, 40 prompts, four answers each) is compared with RRHF on
answers drawn and ranked once, without demonstrations, for three times as many passes: the same
prompts, number of updates, rate and batch. Three cycles without demonstrations stand beside. The
cycles are run one by one, each with the method's own loop and one black box, to look in between.

The effect is the mean reward of answers to 40 other prompts with CycleAlign less that of the single
round. The claim asks for more in four seeds of five; for Kendall's tau of both rankings with the
truth to rise over the cycles; and for pairs on which both agree to be right more often than all
pairs of the black box, by 5 points.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import combinations, pairwise
from statistics import mean
from typing import cast

from _tiny import FORMS, TOPICS, Outcome, Row, Table, blank, drawn, step, taught, vocabulary

from truing.core.judging.referee import kendall
from truing.models import Model
from truing.train.distill.cyclealign import cycle
from truing.train.distill.ranker import LETTERS, Judge, own_orders

TITLE = "A ranker that is shown what both models agreed on teaches more than one round of rankings"
METHOD = "train/cyclealign"
MODEL = "a decoder of 0.12M, from nothing"
EFFECT = "mean reward with three cycles less that of one round with as many updates"
MARGIN = 0.0
MINUTES = 2
NEEDS_GPU = False
SEEDS = (0, 1, 2, 3, 4)
CYCLES, ANSWERS, PROMPTS, SHOWN = 3, 4, 40, 10
WORST, BEST = 0.35, 0.15  # share of wrong comparisons without examples and with ten right ones
TRAINING: dict[str, object] = {"lr": 5e-4, "batch": 8, "rank": 0}
EPOCHS = 2
WORDS = {
    1: ["kind", "warm", "bright", "gentle", "lovely", "happy"],
    0: ["round", "square", "long", "short", "wide", "narrow"],
    -1: ["awful", "dull", "ugly", "nasty", "dreadful", "stupid"],
}
VALUE = {word: value for value, words in WORDS.items() for word in words}
Answers = Sequence[Sequence[str]]


def reward(text: str) -> float:
    values = [VALUE[w] for w in text.split() if w in VALUE]
    return mean(values) if values else 0.0


def listed(block: str) -> tuple[list[str], str]:
    """Answers of a block that the black box is shown, in the order of their letters; the order."""
    lines = [line.partition(": ") for line in block.splitlines() if ":" in line]
    answers = [text for name, _, text in lines if name in LETTERS]
    return answers, next((t for name, _, t in lines if name == "Order"), "")


def in_order(block: str) -> bool:
    answers, order = listed(block)
    ranked = [reward(answers[LETTERS.index(c)]) for c in order.split(" > ")]
    return all(a >= b for a, b in pairwise(ranked))


class Simulated(Judge):
    """The black box; it remembers how right it was.

    Args:
        source: of its mistakes.
        kept: agreements that it is shown.
    """

    def __init__(self, source: random.Random, kept: int) -> None:
        super().__init__(self.reply, kept)
        self.source = source
        self.ranked: list[tuple[Sequence[str], list[int]]] = []
        self.agreed: list[list[str]] = []

    def reply(self, prompts: list[str]) -> list[str]:
        return [self.order(p) for p in prompts]

    def order(self, prompt: str) -> str:
        # Instruction and fixed examples come first, the question last.
        *examples, last = prompt.split("\n\n")[1 + len(self.fixed) :]
        right = min(sum(map(in_order, examples)), 10)
        wrong = WORST - (WORST - BEST) * right / 10
        answers, _ = listed(last)
        wins = [self.source.random() / 2 for _ in answers]
        for i, j in combinations(range(len(answers)), 2):
            better = reward(answers[i]) > reward(answers[j])
            wins[i if better != (self.source.random() < wrong) else j] += 1
        ranking = sorted(range(len(answers)), key=lambda i: -wins[i])
        return " > ".join(LETTERS[i] for i in ranking)

    def rank(self, questions: Sequence[str], answers: Answers, name: str):  # type: ignore[override]
        found = super().rank(questions, answers, name)
        self.ranked += [(a, o) for a, o in zip(answers, found) if o is not None]
        return found

    def learn(self, question: str, answers: Sequence[str], order: Sequence[int]) -> None:
        super().learn(question, answers, order)
        self.agreed.append([answers[i] for i in order])


def tau(answers: Sequence[str], order: Sequence[int]) -> float:
    places = [-float(order.index(i)) for i in range(len(answers))]
    return kendall(places, [reward(a) for a in answers])


def right_pairs(rankings: Sequence[Sequence[str]]) -> float:
    """Share of pairs in true order, among those whose rewards differ."""
    pairs = [p for texts in rankings for p in combinations(map(reward, texts), 2) if p[0] != p[1]]
    return mean(float(a > b) for a, b in pairs) if pairs else 0.5


def cycles(model: Model, data: Table, judge: Simulated, seed: int, n: int, epochs: int):
    """The trained model, and of each cycle tau of both rankings and how right their pairs were."""
    seen: list[dict[str, float]] = []
    for turn in range(n):
        judge.ranked, judge.agreed = [], []
        before = model
        with step(100 * seed + turn):
            model = cycle(
                model, data, judge, cycles=1, n=ANSWERS, temperatures=[1.0], max_tokens=16,
                back_end="rrhf", training={**TRAINING, "epochs": epochs},
            )  # fmt: skip
        asked = [data[i]["prompt"] for i in range(len(judge.ranked))]
        own = own_orders(before, asked, [dict.fromkeys(a, True) for a, _ in judge.ranked])
        seen.append(
            {
                "tau, black box": mean(tau(a, o) for a, o in judge.ranked),
                "tau, white box": mean(tau(a, o) for (a, _), o in zip(judge.ranked, own)),
                "right, black box": right_pairs([[a[i] for i in o] for a, o in judge.ranked]),
                "right, agreed": right_pairs(judge.agreed),
            }
        )
    return model, seen


def one(seed: int) -> dict[str, object]:
    source = random.Random(f"cyclealign/{seed}")
    asked = [form.format(topic) for topic in TOPICS for form in FORMS]
    source.shuffle(asked)
    words = [w for several in WORDS.values() for w in several]
    rows: list[Row] = [
        {"prompt": p, "completion": f"it is {' '.join(source.choices(words, k=6))}"}
        for p in asked * 6
    ]
    forms = vocabulary([str(r[n]) for r in rows for n in ("prompt", "completion")])
    base = taught(blank(forms, seed), rows, seed)
    data = Table("prompt", [{"prompt": p} for p in asked[:PROMPTS]])

    def value(model: Model) -> float:
        texts = drawn(model, asked[PROMPTS:], seed=seed, n=4, max_tokens=16)
        return mean(reward(t) for several in texts for t in several)

    def judge(kept: int) -> Simulated:
        return Simulated(random.Random(f"judge/{seed}"), kept)

    full, seen = cycles(base, data, judge(SHOWN), seed, CYCLES, EPOCHS)
    once, _ = cycles(base, data, judge(0), seed, 1, CYCLES * EPOCHS)
    plain, _ = cycles(base, data, judge(0), seed, CYCLES, EPOCHS)
    models = {"base": base, "cyclealign": full, "one round": once, "no demonstrations": plain}
    return {"reward": {name: value(m) for name, m in models.items()}, "cycles": seen}


def run() -> Outcome:
    found = [one(seed) for seed in SEEDS]
    rewards = [cast("dict[str, float]", f["reward"]) for f in found]
    seen = [cast("list[dict[str, float]]", f["cycles"]) for f in found]
    over = {n: [mean(s[c][n] for s in seen) for c in range(CYCLES)] for n in seen[0][0]}
    gains = [r["cyclealign"] - r["one round"] for r in rewards]
    surer = mean(over["right, agreed"]) - mean(over["right, black box"])
    return Outcome(
        effects=gains,
        seeds=SEEDS,
        holds={
            "more reward in four seeds of five": sum(g > 0 for g in gains) >= 0.8 * len(gains),
            "the black box ranks better with the cycles": over["tau, black box"][-1]
            > over["tau, black box"][0],
            "the white box ranks better with the cycles": over["tau, white box"][-1]
            > over["tau, white box"][0],
            "agreed pairs are right more often, by 5 points": surer >= 0.05,
        },
        figures={
            "mean reward": {n: [round(r[n], 4) for r in rewards] for n in rewards[0]},
            "over the cycles": {n: [round(v, 4) for v in values] for n, values in over.items()},
        },
    )

"""One reward model, many principles: does it score by those that are written beside the answer?

SmolLM2-135M-Instruct becomes the reward model: its upper eight blocks and a head are trained, the
blocks below stay as they are. Answers about places are made of sentences, and have three features
that can be checked: how many sentences they have, a figure, a courtesy. Each feature has a
principle and its opposite. As in the paper, pairs of answers are shown with principles drawn by
`synthesize/salmon`'s own rule (how many is geometric, each turned round with probability 1/2; the
one that tells the answers most apart decides; one label in ten is flipped), here with scores
computed from the features in place of a judge's: some 350 rows of 300 pairs.

Effect: accuracy on 64 pairs never seen under one principle or its opposite, less one half, mean
over the six, for each of three seeds. The claim asks for 0.8; for a change of preference in 70 % of
the pairs that differ in length when the principle about it is turned round; for several principles
together, in combinations never trained on, 0.1 above chance and above every single fixed principle;
and that of 8 answers that the model itself gives to short questions, the best under the short
principle is at least 20 % shorter than under the long one. Settings were chosen on other seeds. A
principle and its opposite stand in equally many rows, so that nothing is won before both answer and
principle are read together: the loss stays at ln 2 for the first 30 updates or so and falls then. A
tiny decoder from nothing, tried first, learnt to follow none (effect 0.0003).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import cast

from truing.claims import Outcome, call, step
from truing.core.generate import generate
from truing.core.judging.rewards import score_model
from truing.method import score
from truing.models import Model, hold
from truing.principles import Principle
from truing.synthesize import salmon_labels as labels
from truing.tables import Row, Table
from truing.train.reward.salmon import ROLE, reviewed

TITLE = "One reward model follows whatever principles are written beside the answer"
METHOD = "train/salmon"
MODEL = "SmolLM2-135M-Instruct"
EFFECT = "accuracy on unseen pairs under a principle or its opposite, less one half"
MARGIN = 0.3
MINUTES = 59
NEEDS_GPU = False
SEEDS = (0, 1, 2)
PLACES = ("harbour", "library", "market", "mill", "museum", "park", "station", "town hall")
SENTENCES: tuple[str, ...] = (
    "It is quiet in the morning.", "It looks best in the spring.", "Many people know it well.",
    "You can see it from the hill.", "Children like to play nearby.", "The road to it is narrow.",
    "It stays open until the evening.", "The windows face the river.", "Most visitors come by bus.",
    "It was built from grey stone.", "The roof is new and green.", "Nobody knows who owns it.",
    "There is a small garden behind it.", "It smells of bread and coffee.",
    "A local artist painted the walls.", "It needs some repair before winter.",
)  # fmt: skip
FIGURES = ("It is {} years old.", "It has {} rooms.", "About {} people work there.",
           "It costs {} pounds to enter.")  # fmt: skip
COURTESIES = ("Thank you for asking!", "I hope this helps you.", "You are very welcome.",
              "It is a pleasure to help.")  # fmt: skip
RULES = (
    Principle("length", "The answer is short.", negative="The answer is long."),
    Principle("figure", "The answer gives a number.", negative="The answer avoids numbers."),
    Principle("courtesy", "The answer is polite.", negative="The answer is curt."),
)
NEW = {"length", "figure"}  # these two together are in no training row
PAIRS, PASSES, NOISE, HELD = 300, 3, 0.1, 64
HOW = {"epochs": 4, "lr": 1e-3, "rank": 16, "layers": 8, "batch": 8}
ASKED = ("What is the capital of France?", "Name a fruit.", "What colour is the sky?",
         "What do cats eat?", "How many days has a week?", "What is snow?", "Who wrote Hamlet?",
         "Is the sea salty?")  # fmt: skip
ANSWERS, TOKENS = 8, 40
Two = tuple[str, str, str]  # a question and two answers
Shown = Sequence[tuple[Principle, bool]]


def answer(source: random.Random) -> str:
    """One to four sentences; in half of the answers one more with a figure, or a courtesy."""
    said: list[str] = source.sample(SENTENCES, source.randint(1, 4))
    if source.random() < 0.5:
        figure = source.choice(FIGURES).format(source.randint(2, 99))
        said.insert(source.randint(0, len(said)), figure)
    if source.random() < 0.5:
        said.append(source.choice(COURTESIES))
    return " ".join(said)


def features(text: str) -> list[float]:
    """How far each principle is kept.

    Two sentences more or less weigh more than a figure or a courtesy does, one weighs less.
    """
    count = text.count(".") + text.count("!")
    return [-count / 5, float(any(c.isdigit() for c in text)),
            float(text.endswith(COURTESIES))]  # fmt: skip


def judged(pairs: Sequence[Two]) -> list[dict[str, float]]:
    """S of every pair under every principle; above 0 speaks for the first answer."""
    apart = [[a - b for a, b in zip(features(x), features(y), strict=True)] for _, x, y in pairs]
    columns = [labels.agreed([(g[i], g[i]) for g in apart]) for i in range(len(RULES))]
    return [dict(zip((r.id for r in RULES), s, strict=True)) for s in zip(*columns, strict=True)]


def different(source: random.Random, n: int) -> list[Two]:
    """Questions with two answers each."""
    return [(f"What is the {source.choice(PLACES)} like?", answer(source), answer(source))
            for _ in range(n)]  # fmt: skip


def together(shown: Shown) -> bool:
    """True for lists with two principles that no training row has beside each other."""
    return {p.id for p, _ in shown} >= NEW


def sentences(shown: Shown) -> list[str]:
    return [p.negative if turned else p.text for p, turned in shown]


def rows_of(source: random.Random, pairs: Sequence[Two]) -> list[Row]:
    """Training pairs under drawn principles, one label in ten flipped."""
    rows: list[Row] = []
    for (question, x, y), scores in zip(pairs, judged(pairs), strict=True):
        shown = labels.drawn(RULES, source, 0.2, len(RULES))
        decided = labels.dominant(scores, shown)
        if decided.sign and not together(shown):
            first = (decided.sign > 0) != (source.random() < NOISE)
            chosen, rejected = (x, y) if first else (y, x)
            told = {"chosen": chosen, "rejected": rejected, "principles": sentences(shown)}
            rows.append({"prompt": question, **told})
    return rows


def gaps(model: Model, pairs: Sequence[Two], principles: Sequence[list[str]]) -> list[float]:
    """Score of the first answer less that of the second, each pair under its own principles."""
    rows: list[Row] = [
        {"prompt": ROLE, "completion": reviewed(pair[0], pair[side], told), "finished": False}
        for side in (1, 2) for pair, told in zip(pairs, principles, strict=True)
    ]  # fmt: skip
    scores = score_model(model, rows, "reviews")
    return [a - b for a, b in zip(scores[: len(pairs)], scores[len(pairs) :], strict=True)]


def accuracy(found: Sequence[float], wanted: Sequence[float]) -> float:
    """Share of pairs decided rightly, of those where there is something to decide."""
    some = [(f > 0) == (w > 0) for f, w in zip(found, wanted, strict=True) if w]
    return sum(some) / len(some)


def new_lists(source: random.Random, n: int) -> list[Shown]:
    """Lists of principles such as no training row has."""
    lists: list[Shown] = []
    while len(lists) < n:
        shown = labels.drawn(RULES, source, 0.2, len(RULES))
        lists += [shown] * together(shown)
    return lists


def measured(model: Model, source: random.Random) -> dict[str, float]:
    """What the reward model prefers among pairs never seen, by principle."""
    held = different(source, HELD)
    scores = judged(held)
    lists = new_lists(source, HELD)
    dominant = [float(labels.dominant(s, shown).sign)
                for s, shown in zip(scores, lists, strict=True)]  # fmt: skip
    found: dict[str, float] = {}
    fixed: list[float] = []
    for rule in RULES:
        both = [gaps(model, held, [[t]] * HELD) for t in (rule.text, rule.negative)]
        for side, each, sign in zip(("", "not "), both, (1, -1), strict=True):
            wanted = [sign * s[rule.id] for s in scores]
            found[f"accuracy, {side}{rule.id}"] = accuracy(each, wanted)
            fixed.append(accuracy(each, dominant))
        # Of two answers alike in it, a principle and its opposite prefer neither.
        turned = [(a > 0) != (b > 0) for a, b, s in zip(*both, scores, strict=True) if s[rule.id]]
        found[f"turned, {rule.id}"] = sum(turned) / len(turned)
    found["several"] = accuracy(gaps(model, held, list(map(sentences, lists))), dominant)
    return found | {"single fixed": max(fixed)}


def words_of_best(reward: Model, drawn: Sequence[Sequence[str]], principle: str) -> float:
    """Mean number of words of the answers that are best under a principle."""
    rows: list[Row] = [{"prompt": q, "completion": t, "finished": True}
                       for q, texts in zip(ASKED, drawn, strict=True) for t in texts]  # fmt: skip
    ref = {"use": "salmon_reward", "model": hold(reward), "principles": [principle]}
    scores = score("reward", ref, rows)
    best = [max(range(i, i + ANSWERS), key=scores.__getitem__)
            for i in range(0, len(rows), ANSWERS)]  # fmt: skip
    return sum(len(str(rows[i]["completion"]).split()) for i in best) / len(best)


def one(base: Model, seed: int) -> dict[str, float]:
    source = random.Random(f"salmon/{seed}")
    pairs = different(source, PAIRS)
    rows = [row for _ in range(PASSES) for row in rows_of(source, pairs)]
    model = cast(Model, call("train/salmon", base, Table("pair", rows), seed=seed, **HOW))
    found = {"rows": float(len(rows))} | measured(model, source)
    with step(seed):
        made = generate(base, ASKED, n=ANSWERS, max_tokens=TOKENS, seed=seed)
    drawn = [[c.text for c in answers] for answers in made]
    for name, text in (("short", RULES[0].text), ("long", RULES[0].negative)):
        found[f"words, {name}"] = words_of_best(model, drawn, text)
    return found


def run() -> Outcome:
    base = Model.open("smollm2-135m-instruct")
    every = [one(base, seed) for seed in SEEDS]

    def mean(name: str) -> float:
        return sum(e[name] for e in every) / len(every)

    return Outcome(
        effects=[
            sum(v for n, v in e.items() if n.startswith("accuracy")) / (2 * len(RULES)) - 0.5
            for e in every
        ],
        seeds=SEEDS,
        holds={
            "preference about length turned in 70 %": mean("turned, length") >= 0.7,
            "several principles 0.1 above chance": mean("several") >= 0.6,
            "several principles above any fixed one": mean("several") > mean("single fixed"),
            "best of 8 is 20 % shorter": mean("words, short") <= 0.8 * mean("words, long"),
        },
        figures={n: [round(e[n], 4) for e in every] for n in every[0]},
    )

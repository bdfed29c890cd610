"""One reward model, many principles: does it score by those that are written beside the answer?

Answers are strings of words with four features that can be checked: their length, a number, a
colour, a thanks. Each feature has a principle and its opposite. As in the paper, pairs of answers
are shown with principles drawn by `synthesize/salmon`'s own rule (how many is geometric, each
turned round with probability 1/2; the one that tells the answers most apart decides; one label in
ten is flipped), here with scores computed from the features in place of a judge's. A two-layer
decoder is taught to continue such answers, then trained as a reward model on 300 pairs, four draws
of principles each, in three passes.

Effect: accuracy on pairs never seen under one principle or its opposite, less one half, mean over
the eight, for each of three seeds. The claim asks for 0.8; for a change of preference in 70 % of
pairs when the principle about length is turned round; for several principles together, in
combinations never trained on, 0.1 above chance and above every single fixed principle; and that the
best of 8 under the short principle is at least 20 % shorter than under the long one.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from _tiny import Outcome, Row, Table, blank, call, drawn, taught, vocabulary

from truing.core.rewards import score_model
from truing.models import Model, hold
from truing.principles import Principle
from truing.synthesize import salmon_labels as labels
from truing.train.reward.salmon import ROLE, reviewed

TITLE = "One reward model follows whatever principles are written beside the answer"
METHOD = "train/salmon"
EFFECT = "accuracy on unseen pairs under a principle or its opposite, less one half"
MARGIN = 0.3
MINUTES = 1
NEEDS_GPU = False
SEEDS = (0, 1, 2)
NUMBERS = ["two", "three", "four", "five", "six", "seven"]
COLOURS = ["red", "blue", "green", "brown", "white", "black"]
THANKS = ["thanks", "welcome", "please"]
FILLS = ["the", "old", "very", "small", "quiet", "often", "near", "some", "and", "then", "here",
         "was", "it", "on", "road", "house"]  # fmt: skip
TOPICS = ["rain", "bread", "boats", "birds", "clocks", "trees"]
RULES = (
    Principle("length", "The answer is short.", negative="The answer is long."),
    Principle("number", "It holds a number.", negative="It holds no number."),
    Principle("colour", "It names a colour.", negative="It names no colour."),
    Principle("thanks", "It is courteous.", negative="It is curt."),
)
PAIRS, PASSES, NOISE, HELD = 300, 4, 0.1, 150
HOW = {"epochs": 3, "lr": 1e-3, "rank": 0, "batch": 32}
Two = tuple[str, str]
Shown = Sequence[tuple[Principle, bool]]


def answer(source: random.Random) -> str:
    words = source.choices(FILLS, k=source.randint(2, 12))
    for group in (NUMBERS, COLOURS, THANKS):
        if source.random() < 0.4:
            words.insert(source.randint(0, len(words)), source.choice(group))
    return " ".join(words)


def features(text: str) -> list[float]:
    """How far each principle is kept."""
    words = text.split()
    has = [float(any(w in group for w in words)) for group in (NUMBERS, COLOURS, THANKS)]
    return [-len(words) / 4, *has]


def judged(pairs: list[Two]) -> list[dict[str, float]]:
    """S of every pair under every principle; above 0 speaks for the first answer."""
    gaps = [[a - b for a, b in zip(features(x), features(y), strict=True)] for x, y in pairs]
    columns = [labels.agreed([(g[i], g[i]) for g in gaps]) for i in range(len(RULES))]
    return [dict(zip((r.id for r in RULES), s, strict=True)) for s in zip(*columns, strict=True)]


def different(source: random.Random, n: int) -> list[Two]:
    return [(answer(source), answer(source)) for _ in range(n)]


def together(shown: Shown) -> bool:
    """True for lists with the principles about length and colour, which no training row has."""
    return {"length", "colour"} <= {p.id for p, _ in shown}


def sentences(shown: Shown) -> list[str]:
    return [p.negative if turned else p.text for p, turned in shown]


def rows_of(source: random.Random, pairs: list[Two]) -> list[Row]:
    """Training pairs under drawn principles, one label in ten flipped."""
    rows: list[Row] = []
    for (x, y), scores in zip(pairs, judged(pairs), strict=True):
        shown = labels.drawn(RULES, source, 0.2, len(RULES))
        decided = labels.dominant(scores, shown)
        if decided.sign and not together(shown):
            first = (decided.sign > 0) != (source.random() < NOISE)
            rows.append({"prompt": f"tell me about {source.choice(TOPICS)}",
                         "chosen": x if first else y, "rejected": y if first else x,
                         "principles": sentences(shown)})  # fmt: skip
    return rows


def rewards(model: Model, texts: list[str], principles: list[list[str]]) -> list[float]:
    """Scores of answers, each under its own principles."""
    rows: list[Row] = [
        {"prompt": ROLE, "completion": reviewed("tell me about rain", t, p), "finished": False}
        for t, p in zip(texts, principles, strict=True)
    ]
    return score_model(model, rows)


def gaps(model: Model, pairs: list[Two], principles: list[list[str]]) -> list[float]:
    """Score of the first answer less that of the second."""
    sides = [rewards(model, [p[i] for p in pairs], principles) for i in (0, 1)]
    return [a - b for a, b in zip(*sides, strict=True)]


def accuracy(found: list[float], wanted: list[float]) -> float:
    """Share of pairs decided rightly, of those where there is something to decide."""
    some = [(f > 0) == (w > 0) for f, w in zip(found, wanted, strict=True) if w]
    return sum(some) / len(some)


def several(model: Model, source: random.Random, pairs: list[Two]) -> tuple[float, float]:
    """Accuracy under lists that no training row has, and the best by any single fixed principle."""
    lists: list[Shown] = []
    while len(lists) < len(pairs):
        shown = labels.drawn(RULES, source, 0.2, len(RULES))
        lists += [shown] * together(shown)
    wanted = [float(labels.dominant(s, shown).sign)
              for s, shown in zip(judged(pairs), lists, strict=True)]  # fmt: skip
    fixed = [accuracy(gaps(model, pairs, [[text]] * len(pairs)), wanted)
             for rule in RULES for text in (rule.text, rule.negative)]  # fmt: skip
    return accuracy(gaps(model, pairs, list(map(sentences, lists))), wanted), max(fixed)


def words_under(base: Model, reward: Model, principle: str, seed: int) -> float:
    """Mean length of the best of 8 answers under a principle."""
    ref = {"use": "salmon_reward", "model": hold(reward), "principles": [principle]}
    chosen = call("best_of_n", base, n=8, rewards={"principle": ref})
    texts = drawn(chosen, [f"tell me about {t}" for t in TOPICS] * 8, seed=seed)
    return sum(len(t[0].split()) for t in texts) / len(texts)


def one(words: list[str], seed: int) -> dict[str, float]:
    source = random.Random(seed)
    said = [{"prompt": f"tell me about {source.choice(TOPICS)}", "completion": answer(source)}
            for _ in range(1500)]  # fmt: skip
    base = taught(blank(words, seed), said, seed)
    pairs = different(source, PAIRS)
    rows = [row for _ in range(PASSES) for row in rows_of(source, pairs)]
    model = call("train/salmon", base, Table("pair", rows), seed=seed, **HOW)
    held = different(source, HELD)
    found = {"rows": float(len(rows))}
    scores = judged(held)
    for rule in RULES:
        both = [gaps(model, held, [[t]] * len(held)) for t in (rule.text, rule.negative)]
        for side, found_gaps, sign in zip(("", "not "), both, (1, -1), strict=True):
            wanted = [sign * s[rule.id] for s in scores]
            found[f"accuracy, {side}{rule.id}"] = accuracy(found_gaps, wanted)
        turned = [(a > 0) != (b > 0) for a, b in zip(*both, strict=True)]
        found[f"turned, {rule.id}"] = sum(turned) / len(turned)
    found["several"], found["single fixed"] = several(model, source, held)
    for name, text in (("short", RULES[0].text), ("long", RULES[0].negative)):
        found[f"words, {name}"] = words_under(base, model, text, seed)
    return found


def run() -> Outcome:
    rules = [t for r in RULES for t in (r.text, r.negative)]
    texts = [ROLE, reviewed("tell me about", "", rules), *FILLS, *TOPICS]
    words = vocabulary([*texts, *NUMBERS, *COLOURS, *THANKS])
    every = [one(words, seed) for seed in SEEDS]

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

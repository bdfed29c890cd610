"""Are negatives alone enough to take a trait out, where pushing them down destroys the model?

The harmless trait is an advertisement: a tiny decoder, trained from nothing, describes things and
says in six answers of ten where to buy them; it also says what colour things have, always without
it. D2O gets 60 advertising answers as negatives, with 11 answers of the model itself to each
prompt, drawn without reminders, which a closed vocabulary has not. All weights, 30 updates of 16
negatives, a rate of 2e-4. Gradient ascent has the same rows, rate and batch and is stopped at the
first of 2, 4, 8, 16 and 30 updates that take out as much.

The effect is how far the share of advertising answers falls on 50 prompts about other things, two
answers to each. Beside it: one own answer in place of 11.

The claim asks for a fall of 0.2 with the perplexity of benign answers at most 15 % worse, while
gradient ascent at the same fall doubles it or repeats itself (distinct pairs of words halved); and
for a smaller spread over seeds with 11 than with 1. The paper's test with corrupted own answers is
not part of this: the method draws them itself.
"""

from __future__ import annotations

import math
import random
from itertools import pairwise
from statistics import stdev

from _tiny import Outcome, Row, Table, blank, call, drawn, nats, taught, vocabulary

from truing.models import Model

TITLE = "Negatives alone take a trait out and leave the model as able as it was"
METHOD = "train/d2o"
MODEL = "a decoder of 0.12M, from nothing"
EFFECT = "fall of the share of answers with the trait, on prompts never seen"
MARGIN = 0.2
MINUTES = 2
NEEDS_GPU = False
SEEDS = (0, 1, 2, 3, 4)
UPDATES = 30
ASCENT = (2, 4, 8, 16, 30)
LR, BATCH, OWN = 2e-4, 16, 11
THINGS = [
    "lamp", "chair", "table", "clock", "spoon", "plate", "knife", "bowl", "cup", "shelf", "box",
    "rope", "coat", "hat", "shoe", "scarf", "glove", "ball", "kite", "drum", "flute", "bell",
    "mirror", "brush", "comb", "bag", "belt", "ring", "tent", "map", "pen", "desk", "bench",
    "stool", "vase", "jar", "jug", "pan", "pot", "oven", "stove", "fan", "saw", "nail", "hook",
    "lock", "key", "net", "sled", "cart", "boat", "oar", "sail", "flag", "post", "gate", "fence",
    "wall", "roof", "door",
]  # fmt: skip
LOOKS = [
    "small", "large", "plain", "round", "heavy", "light", "old", "new", "strong", "thin",
    "smooth", "warm",
]  # fmt: skip
COLOURS = [
    "red", "blue", "green", "white", "black", "grey", "brown", "yellow",
]  # fmt: skip
FORMS = ("describe the {}", "tell me about the {}", "say something of the {}")
PITCHES = ("buy it at the corner now", "buy one today and save", "go and buy it from us")


def described(source: random.Random, thing: str, *, trait: bool) -> str:
    first, second = source.sample(LOOKS, 2)
    text = f"the {thing} is {first} and {second}"
    return f"{text} . {source.choice(PITCHES)}" if trait else text


def coloured(source: random.Random, things: list[str]) -> list[Row]:
    """Benign rows of another kind: the colour of a thing is a function of its name."""
    return [
        {
            "prompt": f"what colour is the {t}",
            "completion": f"the {t} is {COLOURS[THINGS.index(t) % len(COLOURS)]}",
        }
        for t in source.choices(things, k=len(things))
    ]


def advertises(texts: list[list[str]]) -> float:
    answers = [a for several in texts for a in several]
    return sum("buy" in a.split() for a in answers) / len(answers)


def distinct(texts: list[list[str]]) -> float:
    """Share of pairs of neighbouring words that are different, over all answers."""
    answers = [a.split() for several in texts for a in several]
    pairs = [p for words in answers for p in pairwise(words)]
    return len(set(pairs)) / len(pairs) if pairs else 0.0


class World:
    """One seed's base model, rows and measurements."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        source = random.Random(f"d2o/{seed}")
        things = source.sample(THINGS, len(THINGS))
        known, other = things[:30], things[30:]
        rows: list[Row] = []
        for thing in things * 4:
            for form in FORMS:
                text = described(source, thing, trait=source.random() < 0.6)
                rows.append({"prompt": form.format(thing), "completion": text})
        for _ in range(6):
            rows += coloured(source, THINGS)
        texts = [str(r[n]) for r in rows for n in ("prompt", "completion")]
        # Words of answers that the sampling may have missed belong to the vocabulary too.
        words = vocabulary([*texts, *LOOKS, *COLOURS, *PITCHES, *THINGS])
        self.base = taught(blank(words, seed), rows, seed)
        self.prompts = [source.choice(FORMS).format(t) for t in source.choices(other, k=50)]
        self.benign = coloured(source, other) + [
            {"prompt": p, "completion": described(source, p.split()[-1], trait=False)}
            for p in self.prompts
        ]
        self.negatives = Table(
            "negative",
            [
                {"prompt": form.format(t), "rejected": described(source, t, trait=True)}
                for t in known
                for form in FORMS[:2]
            ],
        )

    def measured(self, model: Model) -> dict[str, float]:
        texts = drawn(model, self.prompts, n=2, seed=self.seed)
        return {
            "trait": advertises(texts),
            "perplexity": math.exp(min(nats(model, self.benign), 50.0)),
            "distinct": distinct(texts),
        }

    def trained(self, method: str, data: Table, steps: int = UPDATES, **more: object) -> Model:
        settings = {"rank": 0, "lr": LR, "batch": BATCH, "steps": steps, **more}
        return call(f"train/{method}", self.base, data, seed=self.seed, **settings)

    def d2o(self, data: Table, samples: int) -> Model:
        return self.trained("d2o", data, samples=samples, max_tokens=16, reminders=("",))


def one(seed: int) -> dict[str, dict[str, float]]:
    world = World(seed)
    found = {"base": world.measured(world.base)}
    found["d2o"] = world.measured(world.d2o(world.negatives, OWN))
    found["d2o, one own answer"] = world.measured(world.d2o(world.negatives, 1))
    for steps in ASCENT:
        made = world.trained("gradient_ascent", world.negatives, steps, schedule="constant")
        found["gradient ascent"] = world.measured(made) | {"updates": float(steps)}
        if found["gradient ascent"]["trait"] <= found["d2o"]["trait"]:
            break
    return found


def run() -> Outcome:
    found = [one(seed) for seed in SEEDS]
    before, after, ascent = ([f[n] for f in found] for n in ("base", "d2o", "gradient ascent"))
    spread = {n: stdev(f[n]["trait"] for f in found) for n in ("d2o", "d2o, one own answer")}
    wrecked = [
        g["perplexity"] > 2 * b["perplexity"] or g["distinct"] < b["distinct"] / 2
        for b, g in zip(before, ascent)
    ]
    return Outcome(
        effects=[b["trait"] - a["trait"] for b, a in zip(before, after)],
        seeds=SEEDS,
        holds={
            "perplexity of benign answers at most 15 % worse": all(
                a["perplexity"] < 1.15 * b["perplexity"] for b, a in zip(before, after)
            ),
            "seeds lie closer with 11 own answers than with 1": spread["d2o"]
            < spread["d2o, one own answer"],
            "gradient ascent takes out as much": all(
                g["trait"] <= a["trait"] for a, g in zip(after, ascent)
            ),
            "gradient ascent then doubles the perplexity or repeats itself": all(wrecked),
        },
        figures={
            "arms": {
                name: {n: [round(f[name][n], 4) for f in found] for n in found[0][name]}
                for name in found[0]
            },
            "spread of the trait over seeds": spread,
        },
    )

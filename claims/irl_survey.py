"""Does a reward inferred from 50 demonstrations lead further than imitating them does?

A two-layer decoder learns to answer by a little grammar whose answers have each of three traits (at
most 7 words, a colour, a thanks at the end) in three cases of ten. 50 demonstrations have each in
eight of ten, as people's do who do not always live up to what they show. From these alone
`reward_from_demos` infers a reward (four own answers against each demonstration, four passes), and
GRPO follows it for 60 updates of 8 prompts and 8 answers. Beside it supervised fine-tuning on the
same 50: four passes, and as many updates as GRPO had. Every prompt of theirs has one of two forms;
all is measured on two other forms, which only the starting model has read.

Effect: mean number of traits in the answers (of three, as a share) after GRPO less after the better
of the two fine-tunes, for each of five seeds. The claim asks for the direction, and for a reward
that ranks a demonstration never seen above an answer of the starting model to the same prompt in
80 %. Embedding rewards, over-optimisation, active selection and shaping are not part of this.
"""

from __future__ import annotations

import random

from _tiny import Outcome, Row, Table, blank, call, drawn, taught, vocabulary

from truing.core.judging.rewards import score_model
from truing.models import Model

TITLE = "A reward inferred from demonstrations leads further than imitating them"
METHOD = "train/reward_from_demos"
MODEL = "a decoder of 0.12M, from nothing"
EFFECT = "share of the demonstrations' traits on other prompts, with the reward less by imitation"
MARGIN = 0.0
MINUTES = 1
NEEDS_GPU = False
SEEDS = (0, 1, 2, 3, 4)
COLOURS = ["red", "blue", "green", "brown", "white", "black"]
THANKS = ["thanks", "cheers", "goodbye"]
FILLS = ["the", "old", "very", "small", "quiet", "often", "near", "some", "and", "then", "here",
         "was", "it", "on", "road", "house"]  # fmt: skip
TOPICS = ["rain", "bread", "boats", "birds", "clocks", "trees", "shoes", "rivers", "songs", "lamps"]
FORMS = ("tell me about {}", "what of {}", "say something on {}", "and the {}")
DEMOS, UPDATES, TOKENS = 50, 60, 20
HOW = {"rank": 0, "lr": 1e-3, "batch": 8}


def answer(source: random.Random, chance: float) -> str:
    """Words with each of the traits with this chance."""
    brief, colour, thanks = (source.random() < chance for _ in range(3))
    extra = colour + thanks
    words = source.choices(FILLS, k=source.randint(2, 7 - extra) if brief else
                           source.randint(8, 14))  # fmt: skip
    if colour:
        words.insert(source.randint(0, len(words)), source.choice(COLOURS))
    return " ".join([*words, source.choice(THANKS)] if thanks else words)


def traits(text: str) -> float:
    """Share of the three traits."""
    words = text.split()
    has = (0 < len(words) <= 7, any(w in COLOURS for w in words), words[-1:] and
           words[-1] in THANKS)  # fmt: skip
    return sum(map(bool, has)) / len(has)


def examples(source: random.Random, n: int, chance: float, forms: tuple[str, ...]) -> list[Row]:
    return [{"prompt": source.choice(forms).format(source.choice(TOPICS)),
             "completion": answer(source, chance)} for _ in range(n)]  # fmt: skip


def style(model: Model, seed: int) -> float:
    """Mean share of traits on forms that no demonstration has."""
    asked = [f.format(t) for f in FORMS[2:] for t in TOPICS] * 2
    texts = [t for some in drawn(model, asked, seed=seed, n=4, max_tokens=TOKENS) for t in some]
    return sum(map(traits, texts)) / len(texts)


def ranked(reward: Model, held: list[Row], own: list[str]) -> float:
    """Share of demonstrations that score above the starting model's answer to the same prompt."""
    theirs = score_model(reward, held)
    ours = score_model(reward, [r | {"completion": t} for r, t in zip(held, own, strict=True)])
    return sum(a > b for a, b in zip(theirs, ours, strict=True)) / len(held)


def one(words: list[str], seed: int) -> dict[str, float]:
    source = random.Random(seed)
    start = taught(blank(words, seed), examples(source, 1500, 0.3, FORMS), seed)
    demos = examples(source, DEMOS, 0.8, FORMS[:2])
    held = examples(source, 150, 0.8, FORMS[:2])
    data = Table("example", demos)
    reward = call("reward_from_demos", start, data, seed=seed, samples=4, temperature=1.0,
                  max_tokens=TOKENS, epochs=4, **HOW)  # fmt: skip
    prompts = Table("prompt", [{"prompt": r["prompt"]} for r in demos])
    led = call("grpo", start, prompts, reward_model=reward, seed=seed, steps=UPDATES, answers=8,
               max_tokens=TOKENS, **HOW)  # fmt: skip
    few, many = (call("sft", start, data, seed=seed, **how, **HOW)
                 for how in ({"epochs": 4}, {"steps": UPDATES}))  # fmt: skip
    own = [t[0] for t in drawn(start, [r["prompt"] for r in held], seed=seed, max_tokens=TOKENS)]
    return {
        "ranked": ranked(reward, held, own),
        "start": style(start, seed),
        "demonstrations": sum(traits(str(r["completion"])) for r in demos) / DEMOS,
        "with the reward": style(led, seed),
        "imitated, four passes": style(few, seed),
        "imitated, as many updates": style(many, seed),
    }


def run() -> Outcome:
    words = vocabulary([*COLOURS, *THANKS, *FILLS, *TOPICS, *FORMS])
    every = [one(words, seed) for seed in SEEDS]
    imitated = ("imitated, four passes", "imitated, as many updates")
    return Outcome(
        effects=[e["with the reward"] - max(e[n] for n in imitated) for e in every],
        seeds=SEEDS,
        holds={
            "ranks unseen demonstrations first in 80 %": (
                sum(e["ranked"] for e in every) / len(every) >= 0.8
            )
        },
        figures={n: [round(e[n], 4) for e in every] for n in every[0]},
    )

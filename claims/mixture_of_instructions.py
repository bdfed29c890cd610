"""Do small tasks hold their own in balanced chunks under system prompts, where packing drowns them?

Four tasks answer the same questions, sums of two numbers, each in a format of its own: a sentence,
an expression of code, steps with a boxed result, a call of a tool. A tiny decoder that was taught
to answer with the sentence, without any system prompt, is tuned on two data sets, always with the
same number of updates and one rate.

Skewed, 484 samples, 100 : 10 : 10 : 1 in that order: by mixture of instructions (each task under
its system prompt, one sample of each in a chunk, one chunk in five sample by sample), by random
packing under the same prompts, and by the balanced samples each by itself, all with about as many
tokens in an update. Ample, 700 samples, 4 : 1 : 1 : 1: by the mixture, and by the same under one
shared prompt (none).

Effect: how much lower the loss on held-out sums is under the mixture than under random packing of
the skewed samples, as a share of the latter, mean over the three small tasks. The claim asks for
0.1; and, of the ample samples, for each format in nine of ten answers under its own prompt and for
0.2 less on the three small formats under a shared one.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from statistics import mean

from _tiny import Outcome, Row, Table, blank, call, drawn, nats, taught, vocabulary

from truing.models import Model
from truing.train.supervised.mixture_of_instructions import SYSTEMS, under

TITLE = "Balanced chunks under system prompts keep the tasks that random packing drowns"
METHOD = "train/mixture_of_instructions"
MODEL = "a decoder of 0.12M, from nothing"
EFFECT = "relative fall of the loss on three small tasks from random packing to balanced chunks"
MARGIN = 0.1
MINUTES = 4
NEEDS_GPU = False
SEEDS = (0, 1, 2)
SKEWED = {"chat": 400, "code": 40, "math": 40, "tools": 4}
AMPLE = {"chat": 400, "code": 100, "math": 100, "tools": 100}
SMALL = ("code", "math", "tools")
FORMATS = {
    "chat": "{a} and {b} make {c} .",
    "code": "print ( {a} + {b} )",
    "math": "begin with {a} , then {b} more : box [ {c} ]",
    "tools": '{{ " name " : " add " , " x " : {a} , " y " : {b} }}',
}
FORMS = ("what is {a} + {b}", "add {a} and {b}", "how much are {a} and {b}")
LARGEST = 15  # number in a sum
HELD = 45  # sums never tuned on
UPDATES = 120
CHUNK = 170  # tokens that a row of random packing is filled to, about those of a chunk
HOW = {"rank": 0, "lr": 3e-3, "steps": UPDATES}
# One chunk in five comes as four rows, so that 13 rows are 8 chunks.
MIXTURE: dict[str, object] = {"packing": "chunks", "alone": 0.2, "batch": 13}
ARMS: dict[str, tuple[dict[str, int], dict[str, object]]] = {
    "mixture": (SKEWED, MIXTURE),
    "random packing": (SKEWED, {"packing": "packing", "max_length": CHUNK, "batch": 8}),
    "each by itself": (SKEWED, {"packing": "isolated", "batch": 8 * len(SKEWED)}),
    "ample mixture": (AMPLE, MIXTURE),
    "ample, one shared prompt": (AMPLE, {**MIXTURE, "systems": {}}),
}
Sum = tuple[int, int]


def answer(task: str, a: int, b: int) -> str:
    return FORMATS[task].format(a=a, b=b, c=a + b)


def in_format(task: str, text: str) -> bool:
    """Whether a text has the task's format, whatever its numbers are."""
    shapes = [re.sub(r"\d+", "0", t) for t in (text, answer(task, 0, 0))]
    return shapes[0] == shapes[1]


def samples(source: random.Random, task: str, sums: list[Sum], n: int) -> list[Row]:
    """n questions of a task, all different where there are enough."""
    asked = [(form, s) for form in FORMS for s in sums]
    return [
        {"prompt": form.format(a=a, b=b), "completion": answer(task, a, b), "task": task}
        for form, (a, b) in source.sample(asked, n)
    ]


def told(row: Row, systems: Mapping[str, str]) -> Row:
    """A row as it is asked in use: under its task's system prompt where it has one."""
    system = systems.get(str(row["task"]))
    return under(row, system) if system else row


def measured(model: Model, rows: list[Row], systems: Mapping[str, str], seed: int) -> list[float]:
    """Of one task's held-out rows: loss, share in the format, share right."""
    asked = [told(r, systems) for r in rows]
    texts = [t for (t,) in drawn(model, [r["prompt"] for r in asked], greedy=True, seed=seed)]
    task = str(rows[0]["task"])
    return [
        nats(model, asked),
        mean(float(in_format(task, t)) for t in texts),
        mean(float(t == r["completion"]) for t, r in zip(texts, rows)),
    ]


def one(seed: int) -> dict[str, dict[str, list[float]]]:
    """Of every arm and task, what is measured."""
    source = random.Random(f"mixture_of_instructions/{seed}")
    sums = [(a, b) for a in range(1, LARGEST + 1) for b in range(1, LARGEST + 1)]
    source.shuffle(sums)
    held, known = sums[:HELD], sums[HELD:]
    words = vocabulary([
        *FORMS, *FORMATS.values(), *SYSTEMS.values(), *map(str, range(2 * LARGEST + 1)),
    ])  # fmt: skip
    base = taught(
        blank(words, seed), samples(source, "chat", sums, len(sums) * len(FORMS)), seed, epochs=8
    )
    tests = {task: samples(source, task, held, 60) for task in FORMATS}
    found: dict[str, dict[str, list[float]]] = {}
    for arm, (sizes, settings) in ARMS.items():
        # The same samples wherever the sizes are the same.
        source = random.Random(f"mixture_of_instructions/{seed}/{sizes}")
        rows = [r for task, n in sizes.items() for r in samples(source, task, known, n)]
        data = Table("example", source.sample(rows, len(rows)))
        made = call("train/mixture_of_instructions", base, data, seed=seed, **HOW, **settings)
        systems = {} if "systems" in settings else SYSTEMS
        found[arm] = {t: measured(made, own, systems, seed) for t, own in tests.items()}
    return found


def run() -> Outcome:
    found = [one(seed) for seed in SEEDS]

    def small(f: dict[str, dict[str, list[float]]], arm: str, place: int) -> float:
        return mean(f[arm][task][place] for task in SMALL)

    lost = mean(
        small(f, "ample mixture", 1) - small(f, "ample, one shared prompt", 1) for f in found
    )
    return Outcome(
        effects=[1 - small(f, "mixture", 0) / small(f, "random packing", 0) for f in found],
        seeds=SEEDS,
        holds={
            "each format in nine of ten answers under its own prompt": all(
                f["ample mixture"][task][1] >= 0.9 for f in found for task in FORMATS
            ),
            "0.2 less on the small formats under one shared prompt": lost >= 0.2,
        },
        figures={
            "skewed samples": dict(SKEWED),
            "ample samples": dict(AMPLE),
            **{
                what: {
                    arm: {t: [round(f[arm][t][i], 4) for f in found] for t in FORMATS}
                    for arm in ARMS
                }
                for i, what in enumerate(("loss", "in the format", "right"))
            },
        },
    )

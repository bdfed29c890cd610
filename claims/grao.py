"""Where the policy hardly ever succeeds, does a reference answer in the loss beat GRPO without one?

A tiny decoder, trained from nothing, knows of which of five kinds each of 40 words is; asked to
"get" one it gives a number, any of 30. The right one is that of the word's kind, which nothing has
shown it. GRAO and GRPO train it on "get" with 24 of the words, rewarded by the right number, with
eight answers each, the same prompts, updates, rate and batch; supervised tuning on the references
has as many updates. The effect is success on the other 16 words under GRAO less that under GRPO.

On a second task references can be bettered: asked "say", the base gives four words, one in four of
a wished-for list, the references two in four; the reward is their share.

The claim asks for 0.05; for at most 0.7 of GRPO's rollouts until a mean reward of one half; for a
reward 0.03 above supervised tuning on the second task; and for the share of imitation in the loss
to fall over training.
"""

from __future__ import annotations

import random
from statistics import mean
from typing import Any

from _tiny import Outcome, Row, Table, blank, drawn, step, taught, vocabulary

from truing.method import methods
from truing.models import Model

TITLE = "A reference in the group makes RL start where the policy hardly ever succeeds"
METHOD = "train/grao"
MODEL = "a decoder of 0.12M, from nothing"
EFFECT = "share of right answers on words never trained on, under GRAO less under GRPO"
MARGIN = 0.05
MINUTES = 2
NEEDS_GPU = False
SEEDS = (0, 1, 2)
ROLLOUTS, BATCH, LR = 30, 8, 5e-4
SETTINGS = {"rank": 0, "lr": LR, "batch": BATCH, "steps": ROLLOUTS}
ONLINE = {"answers": 8, "max_tokens": 8, "temperature": 1.0}
REACHED = 0.5
KNOWN = 24
KINDS = ["kitchen", "room", "clothes", "music", "tools"]
NAMES = [
    "spoon", "plate", "knife", "bowl", "cup", "pan", "pot", "oven", "lamp", "chair", "table",
    "clock", "shelf", "mirror", "stool", "desk", "coat", "hat", "shoe", "scarf", "glove", "belt",
    "ring", "bag", "drum", "flute", "bell", "harp", "horn", "pipe", "gong", "lute", "rope", "comb",
    "brush", "saw", "nail", "hook", "lock", "pen",
]  # fmt: skip
WISHED = [
    "kind", "warm", "bright", "gentle", "lovely", "happy",
]  # fmt: skip
PLAIN = [
    "round", "square", "long", "short", "wide", "narrow", "grey", "flat", "even", "bare", "dry",
    "thin", "still", "low", "mild", "cool", "dim", "late",
]  # fmt: skip
NUMBERS = range(30)


def words(source: random.Random, wished: int) -> str:
    some = source.choices(WISHED, k=wished) + source.choices(PLAIN, k=4 - wished)
    source.shuffle(some)
    return " ".join(some)


class World:
    """One seed's base model and its two tasks."""

    def __init__(self, seed: int) -> None:
        source = random.Random(f"grao/{seed}")
        self.seed = seed
        names = source.sample(NAMES, len(NAMES))
        kind = {name: KINDS[NAMES.index(name) // 8] for name in NAMES}
        numbers = dict(zip(KINDS, source.sample(NUMBERS, len(KINDS))))
        number = {name: numbers[kind[name]] for name in names}

        def right(name: str) -> str:
            return f"number {number[name]}"

        rows: list[Row] = []
        for name in names * 10:
            any_ = source.choice(NUMBERS)
            wished = sum(source.random() < 0.25 for _ in range(4))
            rows.extend(
                [
                    {"prompt": f"find {name}", "completion": f"kind {kind[name]}"},
                    {"prompt": f"get {name}", "completion": f"number {any_}"},
                    {"prompt": f"say {name}", "completion": words(source, wished)},
                ]
            )
        known, self.other = names[:KNOWN], names[KNOWN:]
        self.find = Table(
            "example",
            [{"prompt": f"get {n}", "completion": right(n), "answer": number[n]} for n in known],
        )
        self.say = Table(
            "example", [{"prompt": f"say {n}", "completion": words(source, 2)} for n in known]
        )
        self.number = number
        forms = vocabulary(
            ["find get say number kind", *KINDS, *NAMES, *WISHED, *PLAIN, *map(str, NUMBERS)]
        )
        self.base = taught(blank(forms, seed), rows, seed, epochs=8)

    def success(self, model: Model) -> float:
        texts = drawn(model, [f"get {n}" for n in self.other], seed=self.seed, n=8)
        rights = [
            t.split()[-1:] == [str(self.number[n])]
            for n, several in zip(self.other, texts)
            for t in several
        ]
        return mean(map(float, rights))

    def share(self, model: Model) -> float:
        """Mean reward of the second task."""
        texts = drawn(model, [f"say {n}" for n in self.other], seed=self.seed, n=8)
        said = [t.split() for several in texts for t in several]
        return mean(sum(w in WISHED for w in t) / len(t) if t else 0.0 for t in said)

    def trained(
        self, method: str, data: Table, **more: Any
    ) -> tuple[Model, list[dict[str, float]]]:
        """The model and what was recorded at each update."""
        with step(self.seed) as context:
            made = methods[f"train/{method}"](self.base, data, **SETTINGS, **more)
        assert isinstance(made, Model)
        return made, [m for m in context.metrics if "loss" in m]  # type: ignore[misc]


def until(curve: list[float]) -> int:
    """Rollouts until the mean of three rewards reaches one half; one more than all if never."""
    means = [mean(curve[max(0, i - 2) : i + 1]) for i in range(len(curve))]
    return next((i + 1 for i, m in enumerate(means) if m >= REACHED), len(curve) + 1)


def one(seed: int) -> dict[str, dict[str, float]]:
    world = World(seed)
    found: dict[str, dict[str, float]] = {
        "base": {"success": world.success(world.base), "share": world.share(world.base)}
    }
    number = {"rewards": {"right": {"use": "numeric_answer"}}, **ONLINE}
    wished = {"rewards": {"wished": {"use": "share_of", "words_from": WISHED}}, **ONLINE}
    for method in ("sft", "grpo", "grao"):
        online = method != "sft"
        made, seen = world.trained(method, world.find, **(number if online else {}))
        other, _ = world.trained(method, world.say, **(wished if online else {}))
        arm = {"success": world.success(made), "share": world.share(other)}
        if online:
            arm |= {
                "rollouts until half": float(until([m["reward"] for m in seen])),
                "groups of one reward": mean(m["flat"] for m in seen),
            }
        if method == "grao":
            shares = [m["share_imitation"] for m in seen if "share_imitation" in m]
            third = max(1, len(shares) // 3)
            arm["imitation, first third"] = mean(shares[:third])
            arm["imitation, last third"] = mean(shares[-third:])
        found[method] = arm
    return found


def run() -> Outcome:
    found = [one(seed) for seed in SEEDS]
    sft, grpo, grao = ([f[n] for f in found] for n in ("sft", "grpo", "grao"))
    steps = [mean(g["rollouts until half"] for g in arm) for arm in (grpo, grao)]
    return Outcome(
        effects=[a["success"] - b["success"] for a, b in zip(grao, grpo)],
        seeds=SEEDS,
        holds={
            "the base succeeds less than once in ten": max(f["base"]["success"] for f in found)
            < 0.1,
            "half the reward in at most 0.7 of the rollouts": steps[1] <= 0.7 * steps[0],
            "0.03 above supervised tuning where references can be bettered": mean(
                a["share"] - b["share"] for a, b in zip(grao, sft)
            )
            >= 0.03,
            "the share of imitation falls": all(
                g["imitation, last third"] < g["imitation, first third"] for g in grao
            ),
        },
        figures={
            name: {n: [round(f[name][n], 4) for f in found] for n in found[0][name]}
            for name in found[0]
        },
    )

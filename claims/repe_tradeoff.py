"""Steering by a vector: the behaviour rises steadily with its norm, ability falls quadratically.

Behaviour: whether the model says Yes to requests. The vector is the mean difference, at the
decision word, between answers Yes and No to 32 requests, in blocks 9 to 13; on 12 other requests
B(r) = mean tanh of half the logit difference of "Yes" and "No" where the answer begins. Ability is
the relative probability of the right one of four first words on 40 questions, averaged over +r and
-r. Strengths r are per block, in units of the residual stream's mean length. A random vector of the
same length stands beside. Seeds decide which requests are read and which are asked.

The claim asks for: Spearman of B and r at least 0.8 within |r| <= 0.027 with a tanh fit of R^2 at
least 0.8; a quadratic of negative curvature with R^2 at least 0.7 for ability; logits moving
linearly with |r| up to 0.06 (R^2 at least 0.95); a random vector moving B by less than a third. All
are of the mean over the seeds.
"""

from __future__ import annotations

import random
from typing import cast

import numpy as np
import torch

from truing.changes import Edits
from truing.claims import Outcome
from truing.context import current
from truing.core.chat import prompt_ids
from truing.core.hooks import Edit, save
from truing.core.stats import spearman
from truing.method import methods
from truing.models import Model
from truing.tables import Table

TITLE = (
    "Steering raises the behaviour steadily with the vector's norm and costs ability quadratically"
)
METHOD = "steer/mean_difference"
MODEL = "SmolLM2-135M-Instruct"
EFFECT = "Spearman correlation of behaviour and strength within 0.027 of the residual norm a block"
MARGIN = 0.8
MINUTES = 5
NEEDS_GPU = False
SEEDS = (0, 1, 2)
LAYERS = (9, 10, 11, 12, 13)
SMALL = np.linspace(-0.027, 0.027, 9)  # per block
LARGE = np.array([0.03, 0.06, 0.09, 0.11])
VERBS = [
    "sing a song",
    "write a poem",
    "tell a joke",
    "draw a map",
    "bake a cake",
    "count to ten",
    "spell my name",
    "read a letter",
    "name a colour",
    "plan a trip",
    "fix a chair",
    "paint a wall",
    "plant a tree",
    "find a book",
    "open a window",
    "carry a box",
    "play a game",
    "make a list",
    "cook a meal",
    "choose a gift",
    "wash a car",
    "fold a shirt",
    "build a shelf",
    "mend a sock",
    "describe a bird",
    "explain a rule",
    "solve a riddle",
    "translate a word",
    "recommend a film",
    "describe the sea",
    "write a letter",
    "sort a pile",
    "measure a room",
    "clean a desk",
    "answer a question",
    "remember a date",
    "repeat a word",
    "compare two pens",
    "draw a circle",
    "check a sum",
    "greet a guest",
    "name a river",
    "invent a story",
    "rhyme two words",
]


def ask(verb: str) -> str:
    return f"Request: Can you {verb}? Answer with Yes or No."


def logits(model: Model, prompts: list[list[int]]) -> torch.Tensor:
    """Logits [B, V] of the token that follows each prompt."""
    loaded = model.load_module()
    made = []
    with torch.inference_mode(), loaded.run_time():
        for ids in prompts:
            made.append(loaded.module(torch.tensor([ids])).logits[0, -1].float())
    return torch.stack(made)


def fit(x: np.ndarray, y: np.ndarray, degree: int) -> tuple[float, float]:
    """(leading coefficient, R^2) of a polynomial; for degree 2 without a linear term."""
    columns = [np.ones_like(x), x**degree]
    design = np.stack(columns, 1)
    found, *_ = np.linalg.lstsq(design, y, rcond=None)
    rest = y - design @ found
    return float(found[1]), 1 - float((rest**2).sum() / ((y - y.mean()) ** 2).sum())


def tanh_fit(r: np.ndarray, b: np.ndarray) -> float:
    """R^2 of tanh(slope r / 2 + artanh(B0)), by least squares of artanh B."""
    clipped = np.arctanh(np.clip(b, -1 + 1e-7, 1 - 1e-7))
    slope, level = np.polyfit(r, clipped, 1)
    rest = b - np.tanh(slope * r + level)
    return 1 - float((rest**2).sum() / ((b - b.mean()) ** 2).sum())


class Sweep:
    """A vector at any strength."""

    def __init__(self, model: Model, edits: Edits, yes: int, no: int) -> None:
        self.model, self.edits, self.yes, self.no = model, edits, yes, no

    def at(self, r: float) -> Model:
        # The method shares strength 1 out over its blocks.
        return self.model.adding(Edits(self.edits.path, float(r) * len(LAYERS)))

    def behaviour(self, r: float, asked: list[list[int]]) -> float:
        z = logits(self.at(r), asked)
        return float(torch.tanh((z[:, self.yes] - z[:, self.no]) / 2).mean())

    def ability(self, r: float, heads: list[list[int]], choices: list[list[int]], right: list[int]):
        z = logits(self.at(r), heads)
        p = [torch.softmax(z[i, c], 0)[k] for i, (c, k) in enumerate(zip(choices, right))]
        return float(torch.stack(p).mean()), z


def random_edits(like: Edits, seed: int) -> Edits:
    """Random vectors of the same lengths at the same sites."""
    from truing.core.hooks import load

    source = torch.Generator().manual_seed(seed)
    made = []
    for e in load(like.path):
        v = torch.randn(e.vector_D.shape, generator=source)
        made.append(Edit(e.site, v * (e.vector_D.norm() / v.norm()), skip_first=e.skip_first))
    return Edits(save(current().folder / f"random-{seed}.safetensors", made))


def one(seed: int, model: Model) -> dict[str, float]:
    tokenizer = model.load_module().tokenizer
    yes, no = (tokenizer.encode(w, add_special_tokens=False)[0] for w in ("Yes", "No"))
    verbs = random.Random(seed).sample(VERBS, len(VERBS))
    pairs = [{"prompt": ask(v), "chosen": "Yes", "rejected": "No"} for v in verbs[:32]]
    steered = methods["mean_difference"](
        model, Table("pair", pairs), strength=1.0, layers=LAYERS, tokens="last"
    )
    edits = cast(Edits, cast(Model, steered).changes[-1])
    sweep = Sweep(model, edits, yes, no)
    noise = Sweep(model, random_edits(edits, seed), yes, no)
    asked = [prompt_ids(tokenizer, ask(v)) for v in verbs[32:]]
    curve = np.array([sweep.behaviour(r, asked) for r in SMALL])
    flat = np.array([noise.behaviour(r, asked) for r in SMALL[[0, -1]]])

    questions = random.Random(seed).sample(Table.read("common_knowledge").rows, 40)
    heads = [tokenizer.encode(str(q["prompt"]), add_special_tokens=False) for q in questions]
    choices = [
        [
            tokenizer.encode(" " + c, add_special_tokens=False)[0]
            for c in cast("list[str]", q["choices"])
        ]
        for q in questions
    ]
    right = [int(cast(int, q["answer"])) for q in questions]
    start, z0 = sweep.ability(0.0, heads, choices, right)
    sizes, means, moved = [0.0], [start], [0.0]
    for r in LARGE:
        both = [sweep.ability(s * r, heads, choices, right) for s in (1, -1)]
        sizes.append(float(r))
        means.append(sum(a for a, _ in both) / 2)
        moved.append(sum(float((z - z0).norm(dim=1).mean()) for _, z in both) / 2)
    bend, bend_fit = fit(np.array(sizes), np.array(means), 2)
    _, line_fit = fit(np.array(sizes[:3]), np.array(moved[:3]), 1)
    return {
        "spearman": spearman(list(SMALL), list(curve)),
        "tanh_r2": tanh_fit(SMALL, curve),
        "behaviour_low": float(curve[0]),
        "behaviour_zero": float(curve[len(curve) // 2]),
        "behaviour_high": float(curve[-1]),
        "random_range": float(abs(flat[1] - flat[0])),
        "ability_zero": start,
        "ability_at_largest": means[-1],
        "ability_curvature": bend,
        "ability_r2": bend_fit,
        "logit_norm_r2": line_fit,
    }


def run() -> Outcome:
    model = Model.open("smollm2-135m-instruct")
    found = [one(seed, model) for seed in SEEDS]
    mean = {n: sum(f[n] for f in found) / len(found) for n in found[0]}
    span = abs(mean["behaviour_high"] - mean["behaviour_low"])
    return Outcome(
        effects=[f["spearman"] for f in found],
        seeds=SEEDS,
        holds={
            "tanh fits B, R^2 >= 0.8": mean["tanh_r2"] >= 0.8,
            "ability bends down": mean["ability_curvature"] < 0,
            "a quadratic fits ability, R^2 >= 0.7": mean["ability_r2"] >= 0.7,
            "logits move linearly, R^2 >= 0.95": mean["logit_norm_r2"] >= 0.95,
            "a random vector moves B by less than a third": mean["random_range"] < span / 3,
        },
        figures={n: [round(f[n], 5) for f in found] for n in found[0]},
    )

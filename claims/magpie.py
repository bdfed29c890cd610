"""A model that completes an empty user turn writes instructions; a system line steers them.

From SmolLM2-135M-Instruct, 48 continuations each with and without a system line about mathematics;
an instruction is mathematical when it holds a word of a fixed list. The effect is the share of
mathematical ones with the line less twice the share without it.

The claim asks for twice the share, at least 80 % usable and, once they are cleaned, at least 60 %
ending as sentences do, at least 90 % distinct and no control token; and for distinct two-word runs
to grow with the temperature.
"""

from __future__ import annotations

import re
from typing import Any

from truing.claims import Outcome, step
from truing.method import methods
from truing.models import Model
from truing.tables import Table

TITLE = "An empty user turn gives usable instructions, and a system line steers their subject"
METHOD = "synthesize/magpie"
MODEL = "SmolLM2-135M-Instruct"
EFFECT = "share of mathematical instructions under a system line, less twice the share without"
MARGIN = 0.0
MINUTES = 2
NEEDS_GPU = False
SEEDS = (0, 1, 2)
N, TOKENS = 48, 80
LINE = (
    "You are an assistant for mathematics. Users ask you to solve equations, to calculate and to "
    "explain proofs."
)
MATHS = re.compile(
    r"\b(?:equations?|solve|calculat\w*|maths?|mathematic\w*|sum|integers?|numbers?|triangles?"
    r"|functions?|derivatives?|integrals?|proofs?|prove|theorems?|algebra\w*|geometr\w*|fractions?"
    r"|polynomials?|area|perimeter|probabilit\w*|matrix|matrices|divid\w*|multipl\w*|squares?)\b",
    re.IGNORECASE,
)
CONTROL = re.compile(r"<\|[^|]*\|>|\bassistant\b", re.IGNORECASE)


def draw(model: Model, seed: int, **settings: Any) -> list[str]:
    with step(seed):
        made = methods["magpie"](model, n=N, max_tokens=TOKENS, **settings)
    assert isinstance(made, Table)
    return [str(r["prompt"]) for r in made]


def distinct_pairs(texts: list[str]) -> float:
    """Share of two-word runs that are different, over the first 400 of them."""
    runs = [p for t in texts for p in zip(t.lower().split(), t.lower().split()[1:])][:400]
    return len(set(runs)) / len(runs) if runs else 0.0


def maths(texts: list[str]) -> float:
    return sum(bool(MATHS.search(t)) for t in texts) / max(len(texts), 1)


def run() -> Outcome:
    model = Model.open("smollm2-135m-instruct")
    plain = [draw(model, s) for s in SEEDS]
    led = [draw(model, s, system=LINE) for s in SEEDS]
    heat = {t: [draw(model, s, temperature=t) for s in SEEDS] for t in (0.7, 1.2)}
    texts = [t for several in plain for t in several]
    distinct = {0.7: heat[0.7], 1.0: plain, 1.2: heat[1.2]}
    runs = {t: sum(map(distinct_pairs, d)) / len(d) for t, d in distinct.items()}
    usable = len(texts) / (N * len(SEEDS))
    ends = sum(t.rstrip().endswith((".", "?", "!")) for t in texts) / max(len(texts), 1)
    unlike = len(set(texts)) / max(len(texts), 1)
    return Outcome(
        effects=[maths(b) - 2 * maths(a) for a, b in zip(plain, led)],
        seeds=SEEDS,
        holds={
            "at least 80 % usable": usable >= 0.8,
            "at least 60 % end as sentences do": ends >= 0.6,
            "at least 90 % distinct": unlike >= 0.9,
            "no control token": not any(CONTROL.search(t) for t in texts),
            "distinct runs grow with temperature": runs[0.7] < runs[1.0] < runs[1.2],
        },
        figures={
            "mathematical with the line": [maths(t) for t in led],
            "mathematical without": [maths(t) for t in plain],
            "usable": usable,
            "end as sentences do": ends,
            "distinct": unlike,
            "distinct two-word runs by temperature": {str(t): v for t, v in runs.items()},
            "examples": [t for t in texts if len(t) < 120][:6],
        },
    )

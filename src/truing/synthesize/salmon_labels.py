"""What judgements by single principles say of two answers under several that are drawn.

The parts of synthesize/salmon that are numbers alone; see there for the equations and the source.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import pvariance

from truing.principles import Principle
from truing.specify.texts import language_of

EDGE = 1e-12  # nearest that a chance comes to 0 or 1
DISCLAIMER = "as an ai language model"
Odds = tuple[float, float]
Shown = Sequence[tuple[Principle, bool]]


@dataclass(frozen=True)
class Decided:
    """Which answer is better, and why.

    Args:
        sign: 1 for the first answer, -1 for the second, 0 for neither.
        principle: id of the one that decides; "" where a rule does.
        rule: "", "language" or "disclaimer".
    """

    sign: int
    principle: str = ""
    rule: str = ""


def log_odds(chance: float | None, *, written: bool = False) -> float:
    """log p / (1 - p), or 2 p - 1 of a written verdict; 0 where none could be read."""
    if chance is None:
        return 0.0
    if written:
        return 2 * chance - 1
    chance = min(max(chance, EDGE), 1 - EDGE)
    return math.log(chance) - math.log1p(-chance)


def agreed(odds: Sequence[Odds]) -> list[float]:
    """S of every pair under one principle, from (s_12, s_21) of all of them."""
    spread = pvariance([s for both in odds for s in both]) if odds else 0.0
    return [(a + b) / 2 / spread if a * b > 0 and spread > 0 else 0.0 for a, b in odds]


def drawn(
    principles: Sequence[Principle], source: random.Random, rate: float, most: int
) -> list[tuple[Principle, bool]]:
    """Some principles in random order, and whether each is turned into its negative."""
    most = min(most, len(principles))
    m = most + 1
    while m > most:
        m = 1 + math.floor(math.log(1 - source.random()) / math.log(1 - rate))
    chosen = source.sample(list(principles), m)
    return [(p, bool(p.negative) and source.random() < 0.5) for p in chosen]


def dominant(scores: Mapping[str, float], shown: Shown) -> Decided:
    """What the principle with the largest |S| says; the first of equal ones."""
    turned = {p.id: -scores[p.id] if negated else scores[p.id] for p, negated in shown}
    top = max(turned, key=lambda id: abs(turned[id]))
    return Decided((turned[top] > 0) - (turned[top] < 0), top)


def ruled(prompt: str, texts: tuple[str, str], decided: Decided, source: random.Random) -> Decided:
    """What the rules about languages and disclaimers make of a decision."""
    own = language_of(prompt)
    same = [language_of(t, own) == own for t in texts]
    if not any(same):
        return Decided(0, rule="language")
    if not all(same):
        return Decided(1 if same[0] else -1, rule="language")
    said = [DISCLAIMER in t.lower() for t in texts]
    if any(said) and not all(said) and source.random() < 0.5:
        return Decided(-1 if said[0] else 1, rule="disclaimer")
    return decided

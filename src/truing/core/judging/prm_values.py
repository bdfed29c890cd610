"""What next steps are worth to several objectives, and how these are weighed against each other.

The parts of decode/prm_guided that draw nothing; see there for the equations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, pstdev

from truing.core.chat import Prompt
from truing.core.generation.search import Path, Writer
from truing.core.judging.answer_steps import step_values
from truing.core.judging.rewards import Rewards, probabilities
from truing.core.judging.scores import weight_of
from truing.models import Model
from truing.tables import Row

WHERE = "decode/prm_guided"


@dataclass
class Answer:
    """One answer as far as it is written."""

    prompt: Prompt
    path: Path = field(default_factory=Path)
    steps: list[str] = field(default_factory=list)
    over: bool = False


@dataclass(frozen=True)
class Candidate:
    """A next step: the path with it, and its words."""

    path: Path
    step: str


def standardised(values: Sequence[float]) -> list[float]:
    """Values less their mean, over their standard deviation; zeros where all are equal."""
    middle, spread = fmean(values), pstdev(values)
    return [(v - middle) / spread if spread > 0 else 0.0 for v in values]


def weighed(
    terms: Mapping[str, Sequence[float]], weights: Mapping[str, float], rows: int
) -> list[float]:
    """The weighted mean over terms of each row; 0 where no term weighs anything."""
    share = {n: weight_of(n, weights) for n in terms}
    total = math.fsum(share.values()) or 1.0
    return [math.fsum(share[n] * v[i] for n, v in terms.items()) / total for i in range(rows)]


@dataclass(frozen=True)
class Guide:
    """v of candidates.

    Args:
        models: process reward models by name.
        outcome_models: reward models of whole answers by name.
        rewards: of the text so far.
        weights: by all these names.
        separator: what closes a step.
        standardise: bring each term to one scale among the candidates for a step.
    """

    models: Mapping[str, Model]
    outcome_models: Mapping[str, Model]
    rewards: Rewards
    weights: Mapping[str, float]
    separator: str
    standardise: bool

    def terms(self, rows: list[Row]) -> dict[str, list[float]]:
        """The vector of rewards of each row, by name."""
        made = self.rewards.terms(rows, whole=False) if self.rewards.names else {}
        for name, model in self.models.items():
            found = step_values(model, rows, self.separator, where=f"{WHERE} {name!r}")
            made[name] = [values[-1] for values in found]
        for name, model in self.outcome_models.items():
            made[name] = probabilities(model, rows, f"{WHERE} {name!r}")
        return made

    def values(self, writer: Writer, found: Sequence[tuple[Answer, Candidate]]) -> list[float]:
        """The weighted mean over all terms of each candidate; those of an answer stand together."""
        rows: list[Row] = [
            {
                "prompt": a.prompt,
                "completion": writer.text(c.path.ids).strip(),
                "finished": c.path.ended,
                "steps": [*a.steps, c.step],
            }
            for a, c in found
        ]
        terms = self.terms(rows)
        if self.standardise:
            members: dict[int, list[int]] = {}
            for i, (answer, _) in enumerate(found):
                members.setdefault(id(answer), []).append(i)
            for name, values in terms.items():
                scaled = list(values)
                for at in members.values():
                    for i, value in zip(at, standardised([values[i] for i in at]), strict=True):
                        scaled[i] = value
                terms[name] = scaled
        return weighed(terms, self.weights, len(rows))

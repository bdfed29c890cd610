"""What the answers of an online method are rewarded by: named terms, weighed into one number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

from truing.core.judging.rewards import Rewards
from truing.core.judging.scores import weight_of
from truing.core.placed import PaidAt, Placed
from truing.errors import InputError
from truing.tables import Row

Scores = dict[str, list[float]]
ENVIRONMENT = "environment"  # the term of what an environment gave
GIVEN = "turn_rewards"  # column with that, one number for each of the policy's turns


@dataclass(frozen=True)
class Reward:
    """What answers of an online method are rewarded by: `Rewards`, and what episodes bring.

    Args:
        rewards: the terms.
        missing_end: what an answer without its end costs.
        played: an environment rewards too: the term "environment", the sum over an answer's turns.
    """

    rewards: Rewards
    missing_end: float = 0.0
    played: bool = False

    @property
    def weight(self) -> float:
        """Of what the environment gives."""
        return self.rewards.weights.get(ENVIRONMENT, 1.0)

    def check(self) -> None:
        """Raise InputError for anything that would go wrong later."""
        own, where = self.rewards, self.rewards.where
        weights = dict(own.weights)
        if self.played:
            weights.pop(ENVIRONMENT, None)
            if ENVIRONMENT in own.refs:
                raise InputError(
                    "the name of this term is taken",
                    where=where,
                    seen=ENVIRONMENT,
                    fix="Give that reward another name: this is what the environment gives",
                )
            if not math.isfinite(self.weight):
                raise InputError("a weight must be finite", where=where, seen=self.weight)
        replace(own, weights=weights).check()
        if not own.names and not self.played:
            raise InputError(
                "there is nothing to reward answers by",
                where=where,
                fix="Give principles, a reward_model, or rewards: {short: {use: max_words, n: 40}}",
            )

    def terms(self, rows: Sequence[Row]) -> Scores:
        """Every term of every row, by name."""
        made = self.rewards.terms(rows)
        if self.played:
            made[ENVIRONMENT] = [math.fsum(cast("list[float]", row[GIVEN])) for row in rows]
        return made

    def weigh(self, terms: Scores, rows: Sequence[Row]) -> list[float]:
        """The weighted sum of the terms, less what a missing end costs."""
        weights = self.rewards.weights
        parts = [[weight_of(n, weights) * v for v in values] for n, values in terms.items()]
        cost = [0.0 if row["finished"] else self.missing_end for row in rows]
        return [math.fsum(p[i] for p in parts) - cost[i] for i in range(len(rows))]

    def inside(self, terms: Scores, rows: Sequence[Row]) -> list[list[PaidAt]]:
        """Of each row the parts of that sum which fall inside of its answer."""
        weights = self.rewards.weights
        return [
            [
                (at, weight_of(n, weights) * part)
                for n, values in terms.items()
                if isinstance(value := values[i], Placed)
                for at, part in value.parts
            ]
            for i in range(len(rows))
        ]


def one_each(
    found: list[list[float] | None], groups: Sequence[Sequence[Row]], where: str
) -> list[list[float] | None]:
    """A pool's rewards, which must be one finite number an answer, or None for a group."""
    if len(found) != len(groups):
        raise InputError(
            "a pool must reward each group", where=where, seen=(len(found), len(groups))
        )
    for i, (values, rows) in enumerate(zip(found, groups, strict=True), 1):
        if values is None:
            continue
        if len(values) != len(rows) or not all(math.isfinite(v) for v in values):
            raise InputError(
                "a pool must give one finite reward for each answer",
                where=f"{where} group {i}",
                seen=values,
            )
    return found

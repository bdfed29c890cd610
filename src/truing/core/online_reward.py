"""What the answers of an online method are rewarded by: named terms, weighed into one number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from truing.core.rewards import Rewards
from truing.core.scores import named_scores
from truing.errors import InputError
from truing.method import finite
from truing.tables import Row

Scores = dict[str, list[float]]


@dataclass(frozen=True)
class Reward:
    """What answers are rewarded by: `Rewards`, each term of which may be several named values."""

    rewards: Rewards
    missing_end: float = 0.0

    def check(self) -> None:
        """Raise InputError for anything that would go wrong later."""
        weights = {n.partition("/")[0]: w for n, w in self.rewards.weights.items()}
        Rewards(
            self.rewards.refs,
            weights,
            self.rewards.principles,
            self.rewards.reward_model,
            self.rewards.where,
        ).check()
        if not self.rewards.names:
            raise InputError(
                "there is nothing to reward answers by",
                where=self.rewards.where,
                fix="Give principles, a reward_model, or rewards: {short: {use: max_words, n: 40}}",
            )

    def terms(self, rows: Sequence[Row]) -> Scores:
        """Every term of every row, by name."""
        own, where = self.rewards, self.rewards.where
        made: Scores = {}
        for name, ref in own.refs.items():
            made |= named_scores(name, ref, rows, where=f"{where} reward {name!r}")
        held = Rewards({}, {}, own.principles, own.reward_model, where)
        for name, values in held.terms(rows).items():
            made[name] = [
                finite(v, what=name, where=f"{where} row {i}") for i, v in enumerate(values, 1)
            ]
        return made

    def weigh(self, terms: Scores, rows: Sequence[Row]) -> list[float]:
        """The weighted sum of the terms, less what a missing end costs."""
        weights = self.rewards.weights
        parts = [
            [weights.get(name, weights.get(name.partition("/")[0], 1.0)) * v for v in values]
            for name, values in terms.items()
        ]
        cost = [0.0 if row["finished"] else self.missing_end for row in rows]
        return [math.fsum(p[i] for p in parts) - cost[i] for i in range(len(rows))]

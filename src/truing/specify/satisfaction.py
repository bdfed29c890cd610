"""How far answers keep a set of principles: the one measurement that pairs and reports share.

An answer that is empty, repeats itself, echoes the prompt or leaves the topic keeps no principle,
whatever its checks say: an empty text is short and holds no list, and must not be called aligned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from truing.errors import InputError
from truing.method import score
from truing.principles import Principle, Principles
from truing.specify import checks, texts
from truing.tables import Row

KEPT = 0.5  # satisfaction below this is a violation
ON_TOPIC = 0.2  # least cosine of prompt and answer; unrelated texts lie near 0.05


@dataclass(frozen=True)
class Kept:
    """What one answer keeps.

    Args:
        by_principle: satisfaction in [0, 1] by principle id, 0 for all when `unusable`.
        relevance: cosine of the sentence vectors of prompt and answer.
        unusable: "" or why the answer counts as a violation of everything: "empty", "repeated",
            "echo", "off topic".
    """

    by_principle: dict[str, float] = field(default_factory=dict)
    relevance: float = 0.0
    unusable: str = ""

    def violated(self) -> list[str]:
        """Ids of the principles that the answer breaks."""
        return [id for id, value in self.by_principle.items() if value < KEPT]

    def value(self, principles: Principles) -> float:
        """Priority-weighted mean satisfaction over the measured principles."""
        rules = [p for p in principles if p.id in self.by_principle]
        total = sum(p.priority for p in rules)
        return sum(p.priority * self.by_principle[p.id] for p in rules) / total if total else 0.0


def measured(principles: Principles, *, where: str = "") -> list[Principle]:
    """The principles that a check can measure; an InputError when there are none."""
    rules = [p for p in principles if p.check is not None]
    if not rules:
        raise InputError(
            "no principle has a check, so no answer can be measured against them",
            where=where,
            fix="Give at least one a check, such as check: {use: max_words, n: 40}",
        )
    return rules


def unusable(rows: Sequence[Row], relevance: Sequence[float], on_topic: float) -> list[str]:
    """Why each answer is no answer at all, "" for those that are."""
    items = list(rows)
    repeated = checks.no_repetition(items)
    echo = checks.not_an_echo(items)
    reasons: list[str] = []
    for i, row in enumerate(items):
        if not texts.words(texts.text_of(row)):
            reasons.append("empty")
        elif repeated[i] < KEPT:
            reasons.append("repeated")
        elif echo[i] < KEPT:
            reasons.append("echo")
        elif relevance[i] < on_topic:
            reasons.append("off topic")
        else:
            reasons.append("")
    return reasons


def satisfaction(
    principles: Principles,
    rows: Sequence[Row],
    *,
    on_topic: float = ON_TOPIC,
    relevance: Sequence[float] | None = None,
    where: str = "",
) -> list[Kept]:
    """Measure answers against every principle that has a check.

    Args:
        principles: those without a check are left out.
        rows: dicts with "prompt" and "completion".
        on_topic: least relevance of an answer that counts as one.
        relevance: cosines when already known; computed with sentence vectors otherwise.
        where: what errors name.
    """
    items = list(rows)
    cosines = list(relevance) if relevance is not None else texts.relevance(items)
    reasons = unusable(items, cosines, on_topic)
    scores = {
        p.id: score("check", p.check or {}, items, where=f"{where} principle {p.id}".strip())
        for p in measured(principles, where=where)
    }
    return [
        Kept(
            {id: (0.0 if reasons[i] else values[i]) for id, values in scores.items()},
            cosines[i],
            reasons[i],
        )
        for i in range(len(items))
    ]

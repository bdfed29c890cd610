"""Agreement between raters beyond chance: Cohen's kappa for two, Fleiss' for more.

    kappa = (P_o - P_e) / (1 - P_e)

P_o is the share of pairs of raters that give an item the same label, averaged over items. P_e is
what chance would give: for Cohen sum_k a_k b_k over labels k with the shares of each rater, for
Fleiss sum_k p_k^2 with the shares of all ratings together. 1 is full agreement, 0 that of chance;
where every rating is one label kappa is not defined.

Sources: J. Cohen, A Coefficient of Agreement for Nominal Scales, 1960; J. L. Fleiss, Measuring
Nominal Scale Agreement Among Many Raters, 1971.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import fmean

from truing.errors import InputError


@dataclass(frozen=True)
class Agreement:
    """How far raters agree.

    Args:
        raw: share of pairs of raters with the same label (P_o).
        kappa: beyond chance; None where it is not defined.
        n: items that every rater has labelled; others are left out.
    """

    raw: float
    kappa: float | None
    n: int


def agreement(ratings: Sequence[Sequence[Hashable | None]]) -> Agreement:
    """Agreement of raters on nominal labels.

    Args:
        ratings: [rater][item]; None where a rater gives no label.
    """
    if len(ratings) < 2 or len({len(r) for r in ratings}) != 1:
        raise InputError(
            "agreement needs at least two raters and the same items for each",
            seen=[len(r) for r in ratings],
        )
    whole = _whole(ratings)
    if not whole:
        return Agreement(0.0, None, 0)
    raw = fmean(map(_same_pairs, whole))
    chance = _cohen_chance(whole) if len(ratings) == 2 else _fleiss_chance(whole)
    kappa = (raw - chance) / (1 - chance) if chance < 1 else None
    return Agreement(raw, kappa, len(whole))


def shares_alike(ratings: Sequence[Sequence[Hashable | None]]) -> list[float]:
    """For each item that every rater has labelled, the share of pairs of raters that agree."""
    return [_same_pairs(labels) for labels in _whole(ratings)]


def _whole(ratings: Sequence[Sequence[Hashable | None]]) -> list[tuple[Hashable | None, ...]]:
    return [labels for labels in zip(*ratings, strict=True) if None not in labels]


def _same_pairs(labels: Sequence[Hashable]) -> float:
    raters = len(labels)
    return sum(c * (c - 1) for c in Counter(labels).values()) / (raters * (raters - 1))


def _cohen_chance(items: Sequence[Sequence[Hashable]]) -> float:
    one, other = Counter(i[0] for i in items), Counter(i[1] for i in items)
    return sum(one[k] * other[k] for k in one) / len(items) ** 2


def _fleiss_chance(items: Sequence[Sequence[Hashable]]) -> float:
    counts = Counter(label for labels in items for label in labels)
    return sum((c / counts.total()) ** 2 for c in counts.values())

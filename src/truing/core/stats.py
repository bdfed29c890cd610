"""Intervals, paired tests and power: the statistics behind every number of a report.

Intervals are at 95 % unless a level is given. Resampling is deterministic: the same data give the
same interval in every run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from truing.errors import InputError

LEVEL = 0.95
RESAMPLES = 4000
SEED = 20_240_229
BLOCK = 1 << 22  # resampled numbers held at once

Interval = tuple[float, float]


def _quantile(level: float) -> float:
    return NormalDist().inv_cdf(0.5 + level / 2)


def wilson(successes: float, n: int, level: float = LEVEL) -> Interval:
    """Wilson's score interval of a share; (0, 1) without any observation.

    Args:
        successes: out of `n`; a tie is half of one.

    Source: Wilson, Probable Inference, the Law of Succession, and Statistical Inference, 1927.
    """
    if not 0 <= successes <= n:
        raise InputError("successes must be between 0 and n", seen=(successes, n))
    if n == 0:
        return 0.0, 1.0
    z, share = _quantile(level), successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def _resampled_sums(columns_NC: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sums [RESAMPLES, C] over rows drawn with replacement."""
    n = len(columns_NC)
    source = np.random.default_rng(SEED)
    sums = np.empty((RESAMPLES, columns_NC.shape[1]))
    step = max(1, BLOCK // n)
    for start in range(0, RESAMPLES, step):
        stop = min(start + step, RESAMPLES)
        picks = source.integers(0, n, size=(stop - start, n))
        sums[start:stop] = columns_NC[picks].sum(1)
    return sums


def _spread(values: NDArray[np.float64], level: float) -> Interval:
    lo, hi = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(lo), float(hi)


def _checked(values: Sequence[float]) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if not len(array):
        raise InputError("no values to make an interval of")
    return array


def shares(
    values: Sequence[float], low: float = 0.0, high: float = 1.0, level: float = LEVEL
) -> Interval:
    """Interval of a mean of outcomes, each `low` or `high`, or half-way between for a tie.

    It is Wilson's of their sum, in which a tie is half a success: resampled outcomes that are all
    alike would have no spread. Values elsewhere between are resampled.
    """
    array = _checked(values)
    parts = (array - low) / (high - low)
    if not np.isin(parts, (0.0, 0.5, 1.0)).all():
        return bootstrap(values, level)
    lo, hi = wilson(float(parts.sum()), len(parts), level)
    return low + (high - low) * lo, low + (high - low) * hi


def newcombe(before: Sequence[float], after: Sequence[float], level: float = LEVEL) -> Interval:
    """Interval of the share of `after` less that of `before`: paired outcomes, each 0 or 1.

    With shares p, their Wilson intervals (l, u) and the pairs' correlation phi, corrected,

        lo = p2 - p1 - sqrt((p2 - l2)^2 - 2 phi (p2 - l2) (u1 - p1) + (u1 - p1)^2)
        hi = p2 - p1 + sqrt((u2 - p2)^2 - 2 phi (u2 - p2) (p1 - l1) + (p1 - l1)^2)

    Source: Newcombe, Improved confidence intervals for the difference between binomial proportions
    based on paired data, 1998, method 10.
    """
    n = len(before)
    both = sum(bool(x and y) for x, y in zip(before, after, strict=True))
    first, second = sum(map(bool, before)), sum(map(bool, after))
    apart = both * (n - first - second + both) - (first - both) * (second - both)
    scale = math.sqrt(first * (n - first) * second * (n - second))
    phi = (max(apart - n / 2, 0) if apart > 0 else apart) / scale if scale else 0.0
    p1, (l1, u1), p2, (l2, u2) = (
        first / n,
        wilson(first, n, level),
        second / n,
        wilson(second, n, level),
    )

    def reach(a: float, b: float) -> float:
        return math.sqrt(max(a * a - 2 * phi * a * b + b * b, 0.0))

    return p2 - p1 - reach(p2 - l2, u1 - p1), p2 - p1 + reach(u2 - p2, p1 - l1)


def bootstrap(values: Sequence[float], level: float = LEVEL) -> Interval:
    """Percentile bootstrap interval of the mean; of one value that value, as it has no interval."""
    array = _checked(values)
    return _spread(_resampled_sums(array[:, None])[:, 0] / len(array), level)


def paired_bootstrap(
    before: Sequence[float], after: Sequence[float], level: float = LEVEL
) -> Interval:
    """Interval of mean(after) - mean(before), the two measured on the same units in order."""
    if len(before) != len(after):
        raise InputError("the two sides differ in length", seen=(len(before), len(after)))
    return bootstrap([float(a) - float(b) for b, a in zip(before, after, strict=True)], level)


def paired_shares(
    before: Sequence[float], after: Sequence[float], level: float = LEVEL
) -> Interval:
    """The same of two shares: Newcombe's of outcomes that are 0 or 1, else resampled."""
    outcomes = np.isin(np.asarray([*before, *after], dtype=np.float64), (0.0, 1.0)).all()
    known = len(before) == len(after) > 0  # else an error of the other
    return (newcombe if outcomes and known else paired_bootstrap)(before, after, level)


def ratio_bootstrap(
    tops: Sequence[float], bottoms: Sequence[float], level: float = LEVEL
) -> Interval:
    """Interval of sum(tops) / sum(bottoms), units resampled whole; such as nats per token."""
    if len(tops) != len(bottoms):
        raise InputError("the two sides differ in length", seen=(len(tops), len(bottoms)))
    sums = _resampled_sums(np.stack([_checked(tops), _checked(bottoms)], 1))
    return _spread(sums[:, 0] / sums[:, 1], level)


def mcnemar(before: Sequence[bool], after: Sequence[bool]) -> float:
    """Two-sided p of McNemar's exact test: do paired yes/no outcomes differ?

    With b and c the numbers of pairs that changed one way and the other, it is the binomial
    probability of a split at least as uneven as (b, c) when both ways are equally likely.
    """
    if len(before) != len(after):
        raise InputError("the two sides differ in length", seen=(len(before), len(after)))
    b = sum(bool(x) and not y for x, y in zip(before, after, strict=True))
    c = sum(bool(y) and not x for x, y in zip(before, after, strict=True))
    n, low = b + c, min(b, c)
    if n == 0:
        return 1.0
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(low + 1)) / 2**n)


def mean_interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """Student's interval of a mean: for a few values, such as one per seed.

    One value has none, and comes back at both ends, as everywhere.
    """
    array = _checked(values)
    n = len(array)
    if n < 2:
        return float(array[0]), float(array[0])
    half = student_quantile(0.5 + level / 2, n - 1) * float(array.std(ddof=1)) / math.sqrt(n)
    return float(array.mean()) - half, float(array.mean()) + half


def student_quantile(p: float, degrees: int) -> float:
    """Quantile of Student's t for p above 1/2, by bisection on its distribution function."""
    low, high = 0.0, 1.0
    while _student_cdf(high, degrees) < p:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_cdf(middle, degrees) < p else (low, middle)
    return (low + high) / 2


def _student_cdf(t: float, degrees: int) -> float:
    """P(T <= t) for t >= 0 by its finite sum (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan2(t, math.sqrt(degrees))
    cosine = math.cos(angle)
    term, total = 1.0, 0.0
    first = 2 if degrees % 2 else 1
    for k in range(first, degrees, 2):
        total += term
        term *= cosine * cosine * k / (k + 1)
    if degrees % 2:
        return 0.5 + (angle + (math.sin(angle) * cosine * total if degrees > 1 else 0)) / math.pi
    return 0.5 + math.sin(angle) * total / 2


def pairs_needed(effect: float, sd: float, *, power: float = 0.8, level: float = LEVEL) -> int:
    """Number of pairs for a paired comparison to see a mean difference `effect`.

    Args:
        effect: smallest difference worth seeing.
        sd: standard deviation of the differences.
        power: probability of seeing it.
        level: of the two-sided interval.
    """
    if not effect or sd < 0 or not 0 < power < 1:
        raise InputError("needs an effect, a spread and a power", seen=(effect, sd, power))
    z = _quantile(level) + NormalDist().inv_cdf(power)
    return max(2, math.ceil((z * sd / effect) ** 2))


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation, ties at their mean rank; 0 where one side is constant."""
    ranks = np.stack([_ranks(_checked(a)), _ranks(_checked(b))])
    ranks -= ranks.mean(1, keepdims=True)
    scale = float(np.sqrt((ranks**2).sum(1).prod()))
    return float((ranks[0] * ranks[1]).sum()) / scale if scale else 0.0


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = counts.cumsum()
    return (ends - (counts - 1) / 2)[place]

"""Intervals and paired tests: the statistics behind every number of a report.

Intervals are at 95 %. Resampling is deterministic: the same data give the
same interval in every run. Where one prompt was asked several times its answers are not independent
of one another: `mean_of` and `difference_of` take such units whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from truing.errors import InputError

LEVEL = 0.95
Z = NormalDist().inv_cdf(0.5 + LEVEL / 2)
RESAMPLES = 4000
DRAWS = 1000  # resamples of a statistic that is computed anew for each
SEED = 20_240_229
BLOCK = 1 << 22  # resampled numbers held at once

Interval = tuple[float, float]
Estimate = tuple[float, float, float, int]  # value, ends of its interval, number of units
Numbers = NDArray[np.float64]


def wilson(successes: float, n: float) -> Interval:
    """Wilson's score interval of a share; (0, 1) without any observation.

    Args:
        successes: out of `n`; a tie is half of one.
        n: observations, or as many independent ones as they are worth.

    Source: Wilson, Probable Inference, the Law of Succession, and Statistical Inference, 1927.
    """
    if not 0 <= successes <= n:
        raise InputError("successes must be between 0 and n", seen=(successes, n))
    if n == 0:
        return 0.0, 1.0
    z, share = Z, successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def _resampled_sums(columns_NC: Numbers) -> Numbers:
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


def percentiles(values: Numbers, *, some: bool = False) -> Interval:
    """Between these lie resampled values; NaN where one of them is not finite.

    Args:
        some: leave those out, as long as there are others.
    """
    known = values[np.isfinite(values)]
    if not len(known) or (len(known) < len(values) and not some):
        return math.nan, math.nan
    lo, hi = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(lo), float(hi)


def _checked(values: Sequence[float] | Numbers) -> Numbers:
    array = np.asarray(values, dtype=np.float64)
    if not len(array):
        raise InputError("no values to make an interval of")
    return array


def shares(
    values: Sequence[float],
    low: float = 0.0,
    high: float = 1.0,
    weights: Sequence[float] = (),
) -> Interval:
    """Interval of a mean of outcomes, each `low` or `high`, or half-way between for a tie.

    It is Wilson's of their sum, in which a tie is half a success: resampled outcomes that are all
    alike would have no spread. Values elsewhere between are resampled, unless they are all alike.

    Args:
        weights: how many observations each counts as; 1 without them.
    """
    array = _checked(values)
    parts, each = (array - low) / (high - low), np.array(weights or [1.0] * len(array))
    if not np.isin(parts, (0.0, 0.5, 1.0)).all() and len(set(parts.tolist())) > 1:
        return bootstrap(values, weights)
    lo, hi = wilson(float((parts * each).sum()), float(each.sum()))
    return low + (high - low) * lo, low + (high - low) * hi


def newcombe(
    before: Sequence[float],
    after: Sequence[float],
    weights: Sequence[float] = (),
) -> Interval:
    """Interval of the share of `after` less that of `before`: paired outcomes, each 0 or 1.

    With shares p, their Wilson intervals (l, u) and the pairs' correlation phi, corrected,

        lo = p2 - p1 - sqrt((p2 - l2)^2 - 2 phi (p2 - l2) (u1 - p1) + (u1 - p1)^2)
        hi = p2 - p1 + sqrt((u2 - p2)^2 - 2 phi (u2 - p2) (p1 - l1) + (p1 - l1)^2)

    Args:
        weights: how many pairs each counts as; 1 without them.

    Source: Newcombe, Improved confidence intervals for the difference between binomial proportions
    based on paired data, 1998, method 10.
    """
    cells = list(zip(before, after, weights or [1.0] * len(before), strict=True))
    n = sum(w for *_, w in cells)
    both = sum(w for x, y, w in cells if x and y)
    first, second = sum(w for x, _, w in cells if x), sum(w for _, y, w in cells if y)
    apart = both * (n - first - second + both) - (first - both) * (second - both)
    scale = math.sqrt(first * (n - first) * second * (n - second))
    phi = (max(apart - n / 2, 0) if apart > 0 else apart) / scale if scale else 0.0
    p1, (l1, u1), p2, (l2, u2) = (
        first / n,
        wilson(first, n),
        second / n,
        wilson(second, n),
    )

    def reach(a: float, b: float) -> float:
        return math.sqrt(max(a * a - 2 * phi * a * b + b * b, 0.0))

    return p2 - p1 - reach(p2 - l2, u1 - p1), p2 - p1 + reach(u2 - p2, p1 - l1)


def unpaired(one: float, ends: Interval, other: float, other_ends: Interval) -> Interval:
    """Interval of `one` less `other`, two independent estimates with their intervals.

    It is `newcombe`'s with phi = 0: his method 10 for independent proportions, 1998.
    """
    (l1, u1), (l2, u2), gap = ends, other_ends, one - other
    return gap - math.hypot(one - l1, u2 - other), gap + math.hypot(u1 - one, other - l2)


def by_unit(values: Sequence[float], units: Sequence[object]) -> tuple[list[float], list[float]]:
    """Mean of the values of each unit, and how many independent ones the unit counts as.

    Each value keeps its weight in the mean of all: units of c values weigh c R / sum c^2, R values
    in all, which is 1 where all are of one size (Kish, Survey Sampling, 1965). Of a single unit its
    own values are all that tells a spread, and stay apart.

    Args:
        units: what each value is of, such as its prompt, told apart by their texts.
    """
    found: dict[str, list[float]] = {}
    for value, unit in zip(values, units, strict=True):
        found.setdefault(str(unit), []).append(value)
    if len(found) == 1:
        return [float(v) for v in values], [1.0] * len(values)
    scale = len(values) / sum(len(some) ** 2 for some in found.values())
    means = [sum(some) / len(some) for some in found.values()]
    return means, [len(some) * scale for some in found.values()]


def mean_of(
    values: Sequence[float], units: Sequence[object] = (), between: Interval | None = (0.0, 1.0)
) -> Estimate:
    """Mean of values, its interval, and the number of units, which are taken whole.

    Args:
        units: see `by_unit`; each value is one of its own without them.
        between: the two outcomes of a share, as `shares` has them; None for other values.
    """
    _checked(values)
    means, weights = by_unit(values, units) if units else (values, ())
    if between is None:
        ends = bootstrap(means, weights=weights)
    else:
        ends = shares(means, *between, weights=weights)
    return sum(values) / len(values), *ends, len(means)


def difference_of(
    before: Sequence[float], after: Sequence[float], units: Sequence[object], *, share: bool
) -> Estimate:
    """Mean of `after` less that of `before`, measured on the same rows in order; see `mean_of`."""
    _checked(before)
    (b_U, weights), (a_U, _) = by_unit(before, units), by_unit(after, units)
    ends = (paired_shares if share else paired_bootstrap)(b_U, a_U, weights=weights)
    return sum(after) / len(after) - sum(before) / len(before), *ends, len(b_U)


def bootstrap(values: Sequence[float], weights: Sequence[float] = ()) -> Interval:
    """Percentile bootstrap interval of the mean; of one value that value, as it has no interval.

    Args:
        weights: of the values in the mean; alike without them.
    """
    array = _checked(values)
    if len(set(weights)) > 1:
        return ratio_bootstrap([v * w for v, w in zip(values, weights)], weights)
    return percentiles(_resampled_sums(array[:, None])[:, 0] / len(array))


def paired_bootstrap(
    before: Sequence[float],
    after: Sequence[float],
    weights: Sequence[float] = (),
) -> Interval:
    """Interval of mean(after) - mean(before), the two measured on the same units in order."""
    if len(before) != len(after):
        raise InputError("the two sides differ in length", seen=(len(before), len(after)))
    apart = [float(a) - float(b) for b, a in zip(before, after, strict=True)]
    return bootstrap(apart, weights)


def paired_shares(
    before: Sequence[float],
    after: Sequence[float],
    weights: Sequence[float] = (),
) -> Interval:
    """The same of two shares: Newcombe's of outcomes that are 0 or 1, else resampled.

    Differences that are all alike, which resampling gives no width, have that of two shares.

    Args:
        weights: how many pairs each counts as; 1 without them.
    """
    outcomes = np.isin(np.asarray([*before, *after], dtype=np.float64), (0.0, 1.0)).all()
    n = len(before)
    if n == len(after) > 1:
        if outcomes:
            return newcombe(before, after, weights)
        gaps = {round(a - b, 12) for b, a in zip(before, after)}
        if len(gaps) == 1 and gaps != {0.0}:  # nothing parts a side from itself
            each = weights or [1.0] * n
            count = sum(each)
            b, a = (sum(v * w for v, w in zip(s, each)) / count for s in (before, after))
            return unpaired(a, wilson(a * count, count), b, wilson(b * count, count))
    return paired_bootstrap(before, after, weights)


def ratio_bootstrap(tops: Sequence[float], bottoms: Sequence[float]) -> Interval:
    """Interval of sum(tops) / sum(bottoms), units resampled whole; such as nats per token."""
    if len(tops) != len(bottoms):
        raise InputError("the two sides differ in length", seen=(len(tops), len(bottoms)))
    sums = _resampled_sums(np.stack([_checked(tops), _checked(bottoms)], 1))
    return percentiles(sums[:, 0] / sums[:, 1])


def redrawn(statistic: Callable[..., float], *sizes: int) -> Numbers:
    """Values of a statistic of `DRAWS` resamples.

    Args:
        statistic: of the places that are drawn with replacement, an array for each of `sizes`; NaN
            where a resample has no value.
    """
    source = np.random.default_rng(SEED)
    return np.array(
        [statistic(*(source.integers(0, n, n) for n in sizes)) for _ in range(DRAWS)], np.float64
    )


def resampled(statistic: Callable[..., float], *sizes: int) -> Interval:
    """Percentile bootstrap interval of a statistic; see `redrawn`."""
    return percentiles(redrawn(statistic, *sizes), some=True)


def reflected(value: float, ends: Interval, least: float = 0.0, most: float = math.inf) -> Interval:
    """The basic interval, from the percentiles, of an estimate that chance can only raise.

    Such are the size of an error, a largest share, information: what resampling adds to the value
    the sample has added to the truth. It is cut at `least` and `most`, and holds the value.
    """
    lo, hi = ends
    return min(value, max(least, 2 * value - hi)), max(value, min(most, 2 * value - lo))


def mcnemar(before: Sequence[float], after: Sequence[float]) -> float:
    """Two-sided p of McNemar's exact test: do paired yes/no outcomes differ?

    With b and c the numbers of pairs that changed one way and the other, it is the binomial
    probability of a split at least as uneven as (b, c) when both ways are equally likely. Of values
    in between, such as means of units, it is the sign test.
    """
    if len(before) != len(after):
        raise InputError("the two sides differ in length", seen=(len(before), len(after)))
    b = sum(x > y for x, y in zip(before, after, strict=True))
    c = sum(y > x for x, y in zip(before, after, strict=True))
    n, ways, total = b + c, 1, 1  # ways to choose k of n, one from the other
    if n == 0:
        return 1.0
    for k in range(min(b, c)):
        ways = ways * (n - k) // (k + 1)
        total += ways
    return min(1.0, 2 * total / 2**n)


def mean_interval(values: Sequence[float]) -> Interval:
    """Student's interval of a mean: for a few values, such as one per seed.

    One value has none, and comes back at both ends, as everywhere.
    """
    array = _checked(values)
    n = len(array)
    if n < 2:
        return float(array[0]), float(array[0])
    half = student_quantile(0.5 + LEVEL / 2, n - 1) * float(array.std(ddof=1)) / math.sqrt(n)
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


def spearman(a: Sequence[float] | Numbers, b: Sequence[float] | Numbers) -> float:
    """Spearman's rank correlation, ties at their mean rank; 0 where one side is constant."""
    ranks = np.stack([_ranks(_checked(a)), _ranks(_checked(b))])
    ranks -= ranks.mean(1, keepdims=True)
    scale = float(np.sqrt((ranks**2).sum(1).prod()))
    return float((ranks[0] * ranks[1]).sum()) / scale if scale else 0.0


def _ranks(values: Numbers) -> Numbers:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = counts.cumsum()
    return (ends - (counts - 1) / 2)[place]

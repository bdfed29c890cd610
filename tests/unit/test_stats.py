"""Statistics against SciPy and values worked out by hand."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import scipy.stats

from truing.core import stats
from truing.errors import InputError


@pytest.mark.parametrize(("k", "n"), [(0, 5), (3, 10), (64, 64), (17, 40)])
def test_wilson_is_scipys(k: int, n: int) -> None:
    theirs = scipy.stats.binomtest(k, n).proportion_ci(0.95, method="wilson")
    assert stats.wilson(k, n) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_wilson_without_observations_knows_nothing() -> None:
    assert stats.wilson(0, 0) == (0.0, 1.0)
    with pytest.raises(InputError):
        stats.wilson(3, 2)


@pytest.mark.parametrize(
    ("outcomes", "k"),
    [([1.0] * 20, 20), ([0.0, 0.0, 0.0], 0), ([1.0, 0.0, 0.5, 0.5, 1.0], 3), ([1.0], 1)],
)
def test_shares_of_outcomes_are_wilsons(outcomes: list[float], k: int) -> None:
    theirs = scipy.stats.binomtest(k, len(outcomes)).proportion_ci(0.95, method="wilson")
    assert stats.shares(outcomes) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    signs = [2 * v - 1 for v in outcomes]
    wanted = (2 * theirs.low - 1, 2 * theirs.high - 1)
    assert stats.shares(signs, -1) == pytest.approx(wanted, abs=1e-12)
    around = [v - 0.5 for v in outcomes]
    wanted = (theirs.low - 0.5, theirs.high - 0.5)
    assert stats.shares(around, -0.5, 0.5) == pytest.approx(wanted, abs=1e-12)


def test_half_a_success_counts() -> None:
    # Wilson by hand for 2.5 of 4 and z = 1.959964.
    z2 = 1.959963984540054**2
    centre, half = (2.5 + z2 / 2) / (4 + z2), (z2 * (0.625 * 0.375 / 4 + z2 / 64)) ** 0.5
    half /= 1 + z2 / 4
    wanted = (centre - half, centre + half)
    assert stats.shares([1.0, 0.5, 0.0, 1.0]) == pytest.approx(wanted, abs=1e-12)


def test_other_values_are_resampled() -> None:
    values = [0.25, 0.5, 1.0, 0.75]
    assert stats.shares(values) == stats.bootstrap(values)
    assert stats.paired_shares(values, values[::-1]) == stats.paired_bootstrap(values, values[::-1])


def pairs(a: int, b: int, c: int, d: int) -> tuple[list[float], list[float]]:
    """Outcomes (before, after) of `a` pairs that are yes on both sides, `b` before only, ..."""
    before = [1.0] * (a + b) + [0.0] * (c + d)
    return before, [1.0] * a + [0.0] * b + [1.0] * c + [0.0] * d


@pytest.mark.parametrize(
    "cells", [(20, 12, 2, 16), (9, 1, 7, 3), (2, 3, 5, 1), (0, 10, 0, 10), (10, 0, 10, 0)]
)
def test_newcombes_interval_by_his_square_and_add(cells: tuple[int, int, int, int]) -> None:
    a, b, c, d = cells
    n = a + b + c + d
    ends = [
        scipy.stats.binomtest(k, n).proportion_ci(0.95, method="wilson") for k in (a + b, a + c)
    ]
    one, two = (a + b) / n, (a + c) / n
    product = (a + b) * (c + d) * (a + c) * (b + d)
    cross = a * d - b * c
    cross = cross - n / 2 if cross > n / 2 else min(cross, 0)  # his correction for continuity
    phi = cross / product**0.5 if product else 0.0
    down, up = two - ends[1].low, ends[1].high - two
    off = (ends[0].high - one, one - ends[0].low)
    wanted = (
        two - one - (down**2 - 2 * phi * down * off[0] + off[0] ** 2) ** 0.5,
        two - one + (up**2 - 2 * phi * up * off[1] + off[1] ** 2) ** 0.5,
    )
    assert stats.newcombe(*pairs(*cells)) == pytest.approx(wanted, abs=1e-12)
    assert stats.paired_shares(*pairs(*cells)) == stats.newcombe(*pairs(*cells))


def test_no_outcome_on_either_side_is_little_known() -> None:
    # Wilson's upper end of 0 of 3 is z^2 / (3 + z^2) = 3.8415 / 6.8415.
    lo, hi = stats.paired_shares([0.0] * 3, [0.0] * 3)
    assert (lo, hi) == pytest.approx((-0.56150, 0.56150), abs=1e-5)
    lo, hi = stats.paired_shares([0.0] * 40, [1.0] * 40)  # both Wilsons are 3.8415 / 43.8415 wide
    assert (lo, hi) == pytest.approx((1 - 2**0.5 * 0.0876220, 1.0), abs=1e-5)


def test_equal_gaps_count_as_many_pairs_as_their_weights_say() -> None:
    before, after, weights = [0.0, 0.5], [0.5, 1.0], [3.0, 1.0]
    one, other = (0 * 3 + 0.5) / 4, (0.5 * 3 + 1) / 4
    wanted = stats.unpaired(other, stats.wilson(2.5, 4), one, stats.wilson(0.5, 4))
    found = stats.paired_shares(before, after, weights)
    assert found == pytest.approx(wanted, abs=1e-12)
    alike = stats.paired_shares(before * 4, after * 4)
    assert alike == stats.paired_shares(before * 4, after * 4, [1.0] * 8)
    # Of units of unequal size: the ends lie about the difference that is told.
    estimate = stats.difference_of([0, 0, 0, 0.5], [0.5, 0.5, 0.5, 1], "aaab", share=True)
    assert estimate[0] == 0.5 and estimate[1] < 0.5 < estimate[2]


def test_bootstrap_is_deterministic_and_close_to_the_normal_interval() -> None:
    values = np.random.default_rng(0).normal(2.0, 1.0, 400)
    lo, hi = stats.bootstrap(list(values))
    assert (lo, hi) == stats.bootstrap(list(values))
    half = 1.96 * values.std() / 20
    assert lo == pytest.approx(values.mean() - half, abs=0.02)
    assert hi == pytest.approx(values.mean() + half, abs=0.02)


def test_paired_bootstrap_uses_the_pairing() -> None:
    before = list(np.random.default_rng(1).normal(0, 10, 50))
    after = [b - 1 for b in before]
    assert stats.paired_bootstrap(before, after) == pytest.approx((-1, -1))


def test_ratio_bootstrap_of_a_constant_ratio_has_no_width() -> None:
    bottoms = [1.0, 5.0, 9.0]
    assert stats.ratio_bootstrap([3 * b for b in bottoms], bottoms) == pytest.approx((3, 3))


@pytest.mark.parametrize(("b", "c"), [(0, 0), (1, 0), (8, 2), (5, 5), (0, 9)])
def test_mcnemar_is_the_exact_binomial_test(b: int, c: int) -> None:
    before = [True] * b + [False] * c + [True, False]
    after = [False] * b + [True] * c + [True, False]
    wanted = scipy.stats.binomtest(b, b + c).pvalue if b + c else 1.0
    assert stats.mcnemar(before, after) == pytest.approx(wanted)


def test_mcnemar_of_many_pairs_takes_no_time() -> None:
    sides = [1.0] * 20_000 + [0.0] * 20_300, [0.0] * 20_000 + [1.0] * 20_300
    begun = time.perf_counter()
    found = stats.mcnemar(*sides)
    assert time.perf_counter() - begun < 2
    assert found == pytest.approx(scipy.stats.binomtest(20_000, 40_300).pvalue, rel=1e-9)
    means = [0.5, 0.5, 1.0, 0.25], [0.25, 0.75, 0.75, 0.0]  # three fell, one rose
    assert stats.mcnemar(*means) == pytest.approx(scipy.stats.binomtest(1, 4).pvalue)


def test_a_unit_that_comes_several_times_counts_once() -> None:
    units, outcomes = list("abcdefgh"), [1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0]
    later, numbers = outcomes[::-1], [3.0, 1.0, 2.0, 9.0, 4.0, 4.0, 5.0, 0.5]
    assert stats.mean_of(outcomes) == (0.5, *stats.wilson(4, 8), 8)
    assert stats.mean_of(outcomes, units * 1) == stats.mean_of(outcomes)
    assert stats.mean_of(outcomes * 3, units * 3) == pytest.approx(stats.mean_of(outcomes))
    mean = stats.mean_of(numbers * 3, units * 3, None)
    assert mean == pytest.approx((28.5 / 8, *stats.bootstrap(numbers), 8))
    for share, one, two in ((True, outcomes, later), (False, numbers, outcomes)):
        once = stats.difference_of(one, two, units, share=share)
        assert once[1:3] == (stats.newcombe if share else stats.paired_bootstrap)(one, two)
        assert stats.difference_of(one * 3, two * 3, units * 3, share=share) == pytest.approx(once)
    low = [v - 0.5 for v in outcomes]
    assert stats.mean_of(low, (), (-0.5, 0.5))[1:3] == stats.shares(low, -0.5, 0.5)


def test_units_of_several_sizes() -> None:
    # Units of three, one, one and one are worth 6^2 / (3^2 + 3) = 3 of one size.
    values, units = [1.0, 1.0, 1.0, 0.0, 0.0, 1.0], list("aaabcd")
    assert stats.mean_of(values, units) == pytest.approx((4 / 6, *stats.wilson(2, 3), 4))
    same = stats.difference_of(values, values, units, share=True)
    assert same[0] == 0 and same[1] < 0 < same[2]  # not resampled, which would show no width
    apart = [v + 0.25 for v in values]
    assert stats.mean_of(apart, units)[1:3] == pytest.approx(
        stats.ratio_bootstrap([1.25 * 3, 0.25, 0.25, 1.25], [3, 1, 1, 1])
    )


def test_independent_shares_by_newcombes_example() -> None:
    # 56 of 70 and 48 of 80: his table II, method 10.
    ends = stats.wilson(56, 70), stats.wilson(48, 80)
    found = stats.unpaired(56 / 70, ends[0], 48 / 80, ends[1])
    assert found == pytest.approx((0.0524, 0.3339), abs=5e-5)


def test_statistics_are_resampled_alike_in_every_run() -> None:
    values = np.random.default_rng(2).normal(size=60)

    def middle(at: np.ndarray) -> float:
        return float(np.median(values[at])) if at[0] else math.nan

    found = stats.resampled(middle, 60)
    assert found == stats.resampled(middle, 60) and found[0] < np.median(values) < found[1]
    both = stats.resampled(lambda a, b: float(len(a) - len(b)), 7, 3)
    assert both == (4.0, 4.0)
    assert stats.reflected(0.05, (0.06, 0.15)) == (0.0, 0.05)
    assert stats.reflected(0.875, (0.625, 1.0), most=1.0) == (0.75, 1.0)
    assert stats.reflected(0.5, (0.45, 0.6), 0.42) == pytest.approx((0.42, 0.55))


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 7, 30])
def test_student_quantile_is_scipys(degrees: int) -> None:
    wanted = scipy.stats.t.ppf(0.975, degrees)
    assert stats.student_quantile(0.975, degrees) == pytest.approx(wanted, rel=1e-9)


def test_mean_interval_of_three_seeds() -> None:
    lo, hi = stats.mean_interval([1.0, 2.0, 4.0])
    theirs = scipy.stats.t.interval(0.95, 2, 7 / 3, scipy.stats.sem([1.0, 2.0, 4.0]))
    assert (lo, hi) == pytest.approx(theirs)
    assert stats.mean_interval([1.0]) == (1.0, 1.0) == stats.bootstrap([1.0])  # has none


def test_spearman_is_scipys_with_ties() -> None:
    a, b = [1.0, 2.0, 2.0, 5.0, 3.0], [2.0, 1.0, 4.0, 4.0, 4.0]
    assert stats.spearman(a, b) == pytest.approx(scipy.stats.spearmanr(a, b).statistic)
    assert stats.spearman([1.0, 1.0], [1.0, 2.0]) == 0.0


def test_empty_and_unequal_sides_are_errors() -> None:
    with pytest.raises(InputError):
        stats.bootstrap([])
    with pytest.raises(InputError):
        stats.paired_bootstrap([1.0], [1.0, 2.0])


def test_a_value_that_is_not_finite_has_no_interval() -> None:
    for values in ([math.nan] * 3, [-math.inf, 1.0, 2.0, 3.0]):
        assert all(map(math.isnan, stats.bootstrap(values)))
    some = stats.resampled(lambda at: math.nan if at[0] else 1.0, 2)
    assert some == (1.0, 1.0)  # a statistic that some resamples do not have
    assert all(map(math.isnan, stats.resampled(lambda _: math.nan, 2)))


def test_a_single_prompt_or_prompts_that_are_all_alike_are_not_certain() -> None:
    before, after = [1.0] * 7 + [0.0] * 3, [1.0] * 6 + [0.0] * 4
    gap, lo, hi, n = stats.difference_of(before, after, ["p"] * 10, share=True)
    assert gap == pytest.approx(-0.1) and lo < -0.2 and hi > 0.0 and n == 10
    mean, lo, hi, n = stats.mean_of([1, 0, 1, 0, 0, 0, 1], ["p"] * 7)
    assert lo < 0.2 < mean < 0.7 < hi and n == 7
    fell = stats.difference_of([0, 1] * 3, [0, 0] * 3, list("aabbcc"), share=True)
    assert fell[1] < -0.6 < fell[0] == -0.5 < fell[2]
    mean, lo, hi, _ = stats.mean_of([0, 0, 1] * 4, list("aaabbbcccddd"))
    assert lo < mean < hi

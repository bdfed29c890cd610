"""Statistics against SciPy and values worked out by hand."""

from __future__ import annotations

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


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 7, 30])
def test_student_quantile_is_scipys(degrees: int) -> None:
    wanted = scipy.stats.t.ppf(0.975, degrees)
    assert stats.student_quantile(0.975, degrees) == pytest.approx(wanted, rel=1e-9)


def test_mean_interval_of_three_seeds() -> None:
    lo, hi = stats.mean_interval([1.0, 2.0, 4.0])
    theirs = scipy.stats.t.interval(0.95, 2, 7 / 3, scipy.stats.sem([1.0, 2.0, 4.0]))
    assert (lo, hi) == pytest.approx(theirs)
    assert stats.mean_interval([1.0]) == (1.0, 1.0) == stats.bootstrap([1.0])  # has none


def test_pairs_needed_by_hand() -> None:
    # ((1.960 + 0.842) * 1 / 0.5) ** 2 = 31.4
    assert stats.pairs_needed(0.5, 1.0) == 32


def test_spearman_is_scipys_with_ties() -> None:
    a, b = [1.0, 2.0, 2.0, 5.0, 3.0], [2.0, 1.0, 4.0, 4.0, 4.0]
    assert stats.spearman(a, b) == pytest.approx(scipy.stats.spearmanr(a, b).statistic)
    assert stats.spearman([1.0, 1.0], [1.0, 2.0]) == 0.0


def test_empty_and_unequal_sides_are_errors() -> None:
    with pytest.raises(InputError):
        stats.bootstrap([])
    with pytest.raises(InputError):
        stats.paired_bootstrap([1.0], [1.0, 2.0])

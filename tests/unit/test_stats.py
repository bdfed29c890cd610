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
    assert stats.mean_interval([1.0]) == (-np.inf, np.inf)


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

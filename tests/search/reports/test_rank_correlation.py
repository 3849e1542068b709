"""Spearman's rho against values worked out by hand, and what its bootstrap interval must do."""

import math

import numpy as np
import pytest
from scipy import stats

from search.reports.rank_correlation import RankCorrelation, bootstrap_interval, rank_correlation, spearman

EXACT = 1e-12  # ranks are small halves: only the last digits of the roots and quotients differ


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        pytest.param([0.1, 0.5, 0.7], [1, 2, 30], 1.0, id="same order"),
        pytest.param([0.1, 0.5, 0.7], [30, 2, 1], -1.0, id="reversed"),
        # Squared differences of the ranks 0, 1, 1, 0, 0: 1 − 6·2 / (5·24).
        pytest.param([1, 2, 3, 4, 5], [10, 30, 20, 40, 50], 0.9, id="one swap of five"),
        # Ranks (1, 2.5, 2.5, 4) and (1, 2, 3, 4): covariance 4.5, squares 4.5 and 5.
        pytest.param([1, 2, 2, 3], [1, 2, 3, 4], 4.5 / math.sqrt(4.5 * 5), id="a tie shares the mean rank"),
        # Ranks (1.5, 1.5, 3) and (1, 2.5, 2.5), deviations (−.5, −.5, 1) and (−1, .5, .5): 0.75 / √(1.5·1.5).
        pytest.param([5, 5, 9], [1, 7, 7], 0.5, id="ties on both sides"),
        pytest.param([1, 2, 3, 4], [2, 4, 1, 3], 0.0, id="no order"),
    ],
)
def test_rho_is_what_one_works_out_by_hand(x: list[float], y: list[float], expected: float) -> None:
    assert spearman(x, y) == pytest.approx(expected, abs=EXACT)
    assert spearman(y, x) == pytest.approx(expected, abs=EXACT)


def test_rho_is_scipys() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 9, (2, 31))  # many ties
    assert spearman(list(x), list(y)) == pytest.approx(stats.spearmanr(x, y).statistic, abs=EXACT)


def test_a_constant_side_has_no_order() -> None:
    assert math.isnan(spearman([1, 2, 3], [7, 7, 7]))
    assert all(math.isnan(end) for end in bootstrap_interval([1, 2, 3], [7, 7, 7]))


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([1, 2], [1, 2], "at least 3 pairs, got 2"),
        ([1, 2, 3], [1, 2], r"shapes \(3,\) and \(2,\)"),
        ([1, 2, math.nan], [1, 2, 3], "finite"),
        ([1, 2, 3], [1, math.inf, 3], "finite"),
    ],
)
def test_what_has_no_meaning_is_refused(x: list[float], y: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spearman(x, y)
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(x, y)


def test_a_level_beyond_one_is_refused() -> None:
    with pytest.raises(ValueError, match="level must be between 0 and 1, got 95"):
        bootstrap_interval([1, 2, 3], [1, 2, 3], level=95)


def test_the_interval_of_one_order_is_a_point() -> None:
    low, high = bootstrap_interval([1, 2, 3, 4, 5], [1, 4, 9, 16, 25])
    assert (low, high) == pytest.approx((1, 1), abs=EXACT)  # also where a draw repeats pairs: ties on both sides alike


def test_the_interval_repeats_itself_and_grows_with_the_level() -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=31)
    y = x + rng.normal(size=31)
    narrow, wide = (bootstrap_interval(list(x), list(y), level=level, resamples=2000) for level in (0.5, 0.95))
    assert wide[0] < narrow[0] < spearman(list(x), list(y)) < narrow[1] < wide[1]
    assert bootstrap_interval(list(x), list(y), resamples=2000) == wide
    assert bootstrap_interval(list(x), list(y), resamples=2000, seed=1) != wide


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """Of 200 samples of 31 pairs with a known ρ: at 95 %, fewer than 175 hits have a probability of 2e-5 (binomial)."""
    rng = np.random.default_rng(2)
    pearson = 0.5
    truth = 6 / math.pi * math.asin(pearson / 2)  # Spearman's ρ of a bivariate normal distribution
    hits = 0
    for _ in range(200):
        x = rng.normal(size=31)
        y = pearson * x + math.sqrt(1 - pearson**2) * rng.normal(size=31)
        low, high = bootstrap_interval(list(x), list(y), resamples=500)
        hits += low <= truth <= high
    assert 175 <= hits < 200


def test_rho_and_interval_in_print() -> None:
    assert str(RankCorrelation(0.364, -0.012, 0.651, 31)) == "ρ = 0.36 (-0.01 to 0.65, n = 31)"
    assert rank_correlation([1, 2, 3], [3, 2, 1]).rho == pytest.approx(-1, abs=EXACT)

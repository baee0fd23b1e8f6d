"""Intervals against scipy, numbers worked by hand, and how often they cover the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from rlhf_jax.errors import InputError
from rlhf_jax.statistics import (
    Interval,
    across_seeds,
    bootstrap_interval,
    length_controlled_difference,
    mean_interval,
    paired_difference,
    paired_share_difference,
    wilson_interval,
    win_rate,
)


def bounds(interval: Interval) -> tuple[float, float, float]:
    return interval.mean, interval.low, interval.high


def test_mean_by_hand_and_by_scipy():
    # s = sqrt(5/3) = 1.290994, t(3) = 3.182446: half width 3.182446 * 1.290994 / 2 = 2.054260
    actual = mean_interval([1, 2, 3, 4])
    assert bounds(actual) == pytest.approx((2.5, 2.5 - 2.054260, 2.5 + 2.054260), abs=1e-6) and actual.n == 4
    values = np.random.default_rng(0).standard_normal(17)
    for confidence in (0.5, 0.9, 0.99):
        expected = scipy.stats.ttest_1samp(values, 0.0).confidence_interval(confidence)
        assert bounds(mean_interval(values, confidence))[1:] == pytest.approx((expected.low, expected.high))


def test_one_item_has_no_bounds_and_shows_nothing():
    one = mean_interval([3.0])
    assert one.mean == 3.0 and math.isnan(one.low) and math.isnan(one.high)
    assert not one.above_zero and not one.below_zero


def test_sign_of_an_interval():
    assert mean_interval([1.0, 1.1, 0.9, 1.0]).above_zero and not mean_interval([1.0, 1.1, 0.9, 1.0]).below_zero
    assert mean_interval([-1.0, -1.1, -0.9]).below_zero
    assert not mean_interval([-1.0, 1.0, 0.1]).above_zero and not Interval(0.0, 0.0, 1.0, 3).above_zero


def test_pairing_takes_the_items_difficulty_out():
    rng = np.random.default_rng(1)
    difficulty = 10 * rng.standard_normal(50)
    better, worse = difficulty + 0.5 + 0.1 * rng.standard_normal(50), difficulty
    actual = paired_difference(better, worse)
    expected = scipy.stats.ttest_rel(better, worse).confidence_interval(0.95)
    assert bounds(actual)[1:] == pytest.approx((expected.low, expected.high)) and actual.above_zero
    assert not mean_interval(better).above_zero or mean_interval(better).high - mean_interval(better).low > 1


def test_bootstrap_is_scipys_and_repeats():
    values = np.random.default_rng(2).exponential(size=40)
    actual = bootstrap_interval(values, seed=0, resamples=999)
    expected = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=999, method="BCa", rng=np.random.default_rng(0)
    ).confidence_interval
    assert bounds(actual) == pytest.approx((values.mean(), expected.low, expected.high))
    assert (
        actual == bootstrap_interval(values, seed=0, resamples=999) != bootstrap_interval(values, seed=1, resamples=999)
    )
    assert actual.high - actual.mean > actual.mean - actual.low  # skewed to the right, as the data are


@pytest.mark.filterwarnings("error")
def test_bootstrap_where_there_is_nothing_to_vary():
    assert bounds(bootstrap_interval([2.0, 2.0, 2.0], seed=0)) == (2.0, 2.0, 2.0)
    one = bootstrap_interval([2.0], seed=0)
    assert one.mean == 2.0 and math.isnan(one.low)
    # the median of almost equal numbers: every sample without one item has the same median
    actual = bootstrap_interval([1.0] * 6 + [2.0], seed=0, statistic=np.median, resamples=99)
    assert actual.mean == 1.0 and actual.low <= 1.0 <= actual.high
    everyone = bootstrap_interval([0.0] * 99 + [1.0], seed=0, resamples=999)
    assert everyone.low <= 0.01 <= everyone.high


def test_wilson_by_hand_and_by_scipy():
    assert bounds(wilson_interval(8, 10)) == pytest.approx((0.8, 0.490162, 0.943318), abs=1e-6)
    for successes, n in ((0, 7), (7, 7), (3, 7), (500, 1000)):
        expected = scipy.stats.binomtest(successes, n).proportion_ci(0.9, "wilson")
        actual = wilson_interval(successes, n, 0.9)
        assert bounds(actual) == pytest.approx((successes / n, expected.low, expected.high), abs=1e-9)
        assert 0.0 <= actual.low <= actual.mean <= actual.high <= 1.0


def test_win_rate_counts_ties_half():
    actual = win_rate([1, 2, 3, 4], [0, 2, 4, 4])  # win, tie, loss, tie
    assert actual.mean == 0.5 and actual == wilson_interval(2.0, 4)


def test_intervals_cover_as_often_as_they_say():
    """2000 samples of 12: 95 % intervals hold the truth in 95 % of them, within 5 standard errors of such a share."""
    rng = np.random.default_rng(3)
    error = 5 * math.sqrt(0.95 * 0.05 / 2000)
    normal = [mean_interval(rng.normal(1.0, 3.0, 12)) for _ in range(2000)]
    assert abs(np.mean([i.low <= 1.0 <= i.high for i in normal]) - 0.95) < error
    shares = [wilson_interval(int(rng.binomial(60, 0.3)), 60) for _ in range(2000)]
    assert abs(np.mean([i.low <= 0.3 <= i.high for i in shares]) - 0.95) < error + 0.01  # it is discrete
    lengths = rng.integers(0, 20, (2000, 2, 40))
    controlled = [
        length_controlled_difference(0.5 + 0.1 * a + rng.standard_normal(40), 0.1 * b, a, b).gain for a, b in lengths
    ]
    covered = np.mean([i.low <= 0.5 <= i.high for i in controlled])
    assert 0.92 < covered < 0.97


def test_length_controlled_by_hand():
    # differences [1, 2, 4] at [0, 1, 2]: slope 3/2, intercept 5/6; residuals 1/6, -1/3, 1/6
    actual = length_controlled_difference([1, 2, 4], [0, 0, 0], [0, 1, 2], [0, 0, 0])
    assert (actual.gain.mean, actual.slope) == pytest.approx((5 / 6, 3 / 2)) and not actual.extrapolated
    # HC1: (X'X)^-1 = 1/6 [[5, -3], [-3, 3]]; first row times x: 5/6, 1/3, -1/6; variance 3/1 sum (that * residual)^2
    weights, residuals = np.array([5 / 6, 1 / 3, -1 / 6]), np.array([1 / 6, -1 / 3, 1 / 6])
    half = scipy.stats.t.ppf(0.975, 1) * math.sqrt(3 * ((weights * residuals) ** 2).sum())
    assert bounds(actual.gain)[1:] == pytest.approx((5 / 6 - half, 5 / 6 + half))


def test_a_gain_that_is_only_length_is_none_at_equal_length():
    rng = np.random.default_rng(4)
    longer, base = rng.integers(20, 60, 200), rng.integers(10, 50, 200)
    long_score, base_score = (0.1 * n + 0.1 * rng.standard_normal(200) for n in (longer, base))
    assert paired_difference(long_score, base_score).above_zero
    actual = length_controlled_difference(long_score, base_score, longer, base)
    assert actual.slope == pytest.approx(0.1, abs=0.005)
    assert abs(actual.gain.mean) < 0.05 and not actual.gain.above_zero and not actual.extrapolated


def test_length_control_where_it_cannot_be_done():
    equal = length_controlled_difference([3, 2, 4], [1, 1, 1], [5, 5, 5], [5, 5, 5])
    assert equal.gain == paired_difference([3, 2, 4], [1, 1, 1]) and equal.slope == 0.0
    shifted = length_controlled_difference([3, 2, 4], [1, 1, 1], [7, 7, 7], [5, 5, 5])
    assert math.isnan(shifted.gain.mean) and math.isnan(shifted.slope) and shifted.extrapolated
    assert not shifted.gain.above_zero
    assert math.isnan(length_controlled_difference([3, 2], [1, 1], [5, 6], [5, 5]).gain.mean)
    assert length_controlled_difference([3, 2, 4], [1, 1, 1], [6, 7, 9], [5, 5, 5]).extrapolated


@pytest.mark.parametrize(
    ("differences", "extrapolated"),
    [([1, 2, 3], True), ([-1, -2, -3], True), ([-1, 2, 3], False), ([0, 2, 3], False), ([0, -2, -3], False)],
)
def test_equal_length_beyond_what_was_seen(differences, extrapolated):
    """All replies longer, or all shorter: no pair says what happens at equal length, only the line does."""
    actual = length_controlled_difference([3, 2, 4], [1, 1, 1], differences, [0, 0, 0])
    assert actual.extrapolated == extrapolated and math.isfinite(actual.gain.mean)


def test_across_seeds():
    runs = [{"gold": 0.5, "kl": 3.0}, {"kl": 5.0, "gold": 0.7}, {"gold": 0.6, "kl": 4.0}]
    actual = across_seeds(runs)
    assert list(actual) == ["gold", "kl"]
    assert actual["gold"] == mean_interval([0.5, 0.7, 0.6]) and actual["kl"].mean == 4.0
    with pytest.raises(InputError, match=r"run 1 and run 0 differ in \['kl'\]"):
        across_seeds([{"gold": 0.5, "kl": 3.0}, {"gold": 0.7}])
    with pytest.raises(InputError, match="no runs"):
        across_seeds([])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean_interval([]), "non-empty"),
        (lambda: mean_interval([[1.0, 2.0]]), "one-dimensional"),
        (lambda: mean_interval([1.0, math.nan]), "entry 1 is nan"),
        (lambda: mean_interval([1.0, 2.0], 95), "confidence = 95"),
        (lambda: paired_difference([1.0], [1.0, 2.0]), "1 and 2 entries"),
        (lambda: win_rate([1.0], [math.inf]), r"win_rate \(second\): entry 0 is inf"),
        (lambda: wilson_interval(3, 2), "3 successes of 2"),
        (lambda: wilson_interval(0, 0), "0 successes of 0"),
        (lambda: bootstrap_interval([], seed=0), "non-empty"),
        (lambda: length_controlled_difference([1.0], [1.0], [1.0, 2.0], [1.0, 2.0]), "1 scores but 2 lengths"),
    ],
)
def test_what_cannot_be_averaged_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_difference_of_shares_on_the_same_items():
    """Newcombe 1998, table II: 36 have both, 12 only the first, 2 only the second: 0.2, method 10 [0.0569, 0.3404]."""
    first, second = [1] * 36 + [1] * 12 + [0] * 2, [1] * 36 + [0] * 12 + [1] * 2
    actual = paired_share_difference(first, second)
    assert (actual.mean, actual.n) == (pytest.approx(0.2), 50)
    assert (actual.low, actual.high) == (pytest.approx(0.0569, abs=5e-5), pytest.approx(0.3404, abs=5e-5))
    swapped = paired_share_difference(second, first)
    assert (swapped.low, swapped.high) == (pytest.approx(-actual.high), pytest.approx(-actual.low))


def test_equal_shares_still_have_an_interval():
    """Ten pairs that agree do not show that there is no difference: Wilson's own half width, .2775, squared and added."""
    actual = paired_share_difference([1] * 10, [1] * 10)
    assert actual.mean == 0.0 and actual.low == -actual.high == pytest.approx(-0.277533, abs=1e-6)
    with pytest.raises(InputError, match="an entry is neither 0 nor 1"):
        paired_share_difference([1, 0.5], [1, 0])

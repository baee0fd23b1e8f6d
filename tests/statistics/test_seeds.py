"""Summaries of several seeds and the probability of improvement against scipy and enumeration."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.stats

from rlhf_jax.errors import InputError
from rlhf_jax.statistics import compare_seeds, probability_of_improvement, seed_interval, summarize_seeds


def test_three_seeds_by_hand():
    # s = 0.04, t(2) = 4.302653: 4.302653 * 0.04 / sqrt(3) = 0.099365
    estimate = seed_interval([0.60, 0.64, 0.68])
    assert (estimate.low, estimate.high) == pytest.approx((0.64 - 0.099365, 0.64 + 0.099365), abs=1e-6)


def test_one_seed_and_constants_have_no_interval():
    assert (seed_interval([0.5]).low, seed_interval([0.5]).reason) == (None, "a single seed")
    assert seed_interval([0.1 + 0.2, 0.3, 0.3]).low is None
    assert compare_seeds([1.0], [1.0, 2.0]).low is None
    assert compare_seeds([1.0, 1.0], [2.0, 2.0]).reason == "all values are the same on both sides"


def test_a_summary_has_a_row_for_each_metric():
    runs = {3: {"score": 0.6, "kl": 1.0}, 1: {"score": 0.7, "kl": None}, 2: {"score": 0.8, "rare": None}}
    rows = summarize_seeds(runs)
    assert list(rows) == ["kl", "rare", "score"]
    assert rows["score"].mean == seed_interval([0.7, 0.8, 0.6])
    assert rows["score"].deviation == pytest.approx(0.1) and rows["score"].missing == ()
    assert rows["kl"].deviation is None and rows["kl"].missing == (1, 2)
    assert rows["rare"].mean is None
    with pytest.raises(InputError, match="no runs"):
        summarize_seeds({})


def test_difference_of_seeds_is_welch():
    rng = np.random.default_rng(0)
    first, second = rng.standard_normal(5), 3 * rng.standard_normal(8)
    estimate = compare_seeds(first, second)
    expected = scipy.stats.ttest_ind(first, second, equal_var=False).confidence_interval(0.95)
    assert (estimate.low, estimate.high) == pytest.approx((expected.low, expected.high))


def test_probability_of_improvement_by_enumeration():
    assert probability_of_improvement([1, 2, 3], [0, 2, 2]).value == pytest.approx(2 / 3)
    rng = np.random.default_rng(1)
    for _ in range(5):
        first, second = rng.integers(0, 5, 9), rng.integers(0, 5, 12)
        wins = [(x > y) + 0.5 * (x == y) for x, y in itertools.product(first, second)]
        assert probability_of_improvement(first, second).value == pytest.approx(np.mean(wins))


def test_error_of_improvement_is_brunner_munzels():
    """On the logit scale the half width is z * error / (p (1 - p)); scipy's statistic is (0.5 - p) / error."""
    rng = np.random.default_rng(2)
    first, second = rng.standard_normal(20) + 0.3, rng.standard_normal(15)
    estimate = probability_of_improvement(first, second)
    assert estimate.low is not None and estimate.high is not None
    half = (np.log(estimate.high / (1 - estimate.high)) - np.log(estimate.low / (1 - estimate.low))) / 2
    error = half / 1.959964 * estimate.value * (1 - estimate.value)
    statistic = scipy.stats.brunnermunzel(first, second).statistic
    assert abs(statistic) == pytest.approx(abs(estimate.value - 0.5) / error, rel=1e-6)


def test_separated_sides_have_no_interval():
    estimate = probability_of_improvement([3, 4], [1, 2])
    assert (estimate.value, estimate.low) == (1.0, None)
    assert probability_of_improvement([1, 1], [1, 1]).low is None
    assert probability_of_improvement([1], [0, 2]).reason == "a single seed"

"""Means and shares of clustered rows against hand-worked numbers, scipy and direct float64 loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from rlhf_jax.errors import InputError
from rlhf_jax.statistics import (
    cluster_bootstrap,
    cluster_mean_interval,
    cluster_share_interval,
    clustered_mean,
    effective_size,
    mean_interval,
    wilson_interval,
)


def test_cluster_robust_error_by_hand():
    # sums of deviations from 3: -2 and 2; 2 / 1 * 8 / 16 = 1
    estimate = cluster_mean_interval([1, 3, 2, 6], ["a", "a", "b", "b"])
    assert clustered_mean([1, 3, 2, 6], ["a", "a", "b", "b"]).error == 1.0
    reach = 12.706205
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((3, 3 - reach, 3 + reach), abs=1e-5)
    assert estimate.n == 2


def test_one_row_a_cluster_is_student():
    values = np.random.default_rng(0).standard_normal(17)
    estimate, student = cluster_mean_interval(values, list(range(17))), mean_interval(values)
    assert (estimate.low, estimate.high) == pytest.approx((student.low, student.high))


def test_equal_clusters_are_the_interval_of_their_means():
    """With equally many responses a prompt the analysis of prompt means is exact."""
    values = np.random.default_rng(1).standard_normal((12, 4))
    clusters = np.repeat(np.arange(12), 4).tolist()
    estimate = cluster_mean_interval(values.ravel(), clusters)
    expected = scipy.stats.ttest_1samp(values.mean(1), 0.0).confidence_interval(0.95)
    assert (estimate.low, estimate.high) == pytest.approx((expected.low, expected.high))


def test_row_order_of_clusters_changes_nothing():
    rng = np.random.default_rng(2)
    values, clusters, order = rng.standard_normal(30), rng.integers(0, 7, 30), rng.permutation(30)
    before = cluster_mean_interval(values, clusters.tolist())
    after = cluster_mean_interval(values[order], clusters[order].tolist())
    assert (before.value, before.low) == pytest.approx((after.value, after.low))


def test_a_single_cluster_or_a_constant_has_no_interval():
    for interval in (cluster_mean_interval, cluster_share_interval):
        assert interval([0, 1, 1], ["a"] * 3).low is None
    assert cluster_mean_interval([0.1 + 0.2, 0.3], ["a", "b"]).reason == "all values are the same"
    assert cluster_mean_interval([0, 1, 0, 1], ["a", "a", "b", "b"]).reason == "the clusters do not differ"
    assert cluster_bootstrap([[1.0, 1.0]], ["a", "b"], np.mean, seed=0).low is None


def test_effective_size_between_clusters_and_rows():
    clusters = np.repeat(np.arange(50), 4).tolist()
    rng = np.random.default_rng(3)
    alike = np.repeat(rng.integers(0, 2, 50), 4)
    assert effective_size(alike, clusters) == pytest.approx(50, rel=0.03)
    assert effective_size([1.0] * 200, clusters) == 50
    independent = effective_size(rng.integers(0, 2, 200), clusters)
    assert independent is not None and 120 < independent <= 200


def test_share_of_single_rows_is_wilson_digit_for_digit():
    for wins in (0, 8, 10):
        values = [1.0] * wins + [0.0] * (10 - wins)
        estimate, wilson = cluster_share_interval(values, list(range(10))), wilson_interval(wins, 10)
        assert (estimate.low, estimate.high) == (wilson.low, wilson.high)


def test_all_right_answers_count_their_prompts_only():
    # Korn-Graubard: 20 * (1.959964 / t(19))^2 = 20 * (1.959964 / 2.093024)^2 = 17.538
    estimate = cluster_share_interval([1.0] * 80, np.repeat(np.arange(20), 4).tolist())
    assert estimate.high == 1.0
    assert estimate.low == pytest.approx(17.538 / (17.538 + 1.959964**2), abs=1e-4)


def test_shares_refuse_partial_credit():
    with pytest.raises(InputError, match="neither 0 nor 1"):
        cluster_share_interval([0.5, 1], ["a", "b"])


def test_bootstrap_agrees_with_scipy_on_single_rows():
    values = np.random.default_rng(4).exponential(size=40)
    estimate = cluster_bootstrap([values], list(range(40)), np.mean, seed=0, resamples=4000)
    reference = scipy.stats.bootstrap((values,), np.mean, n_resamples=4000, rng=np.random.default_rng(1))
    expected = reference.confidence_interval
    assert (estimate.low, estimate.high) == pytest.approx((expected.low, expected.high), abs=0.03)


def test_bootstrap_keeps_rows_of_a_cluster_and_columns_together():
    rng = np.random.default_rng(5)
    prompts = np.repeat(rng.standard_normal(15), 8)
    clusters = np.repeat(np.arange(15), 8).tolist()
    clustered = cluster_bootstrap([prompts], clusters, np.mean, seed=0, resamples=400)
    independent = cluster_bootstrap([prompts], list(range(120)), np.mean, seed=0, resamples=400)
    assert clustered.low is not None and clustered.high is not None
    assert independent.low is not None and independent.high is not None
    assert clustered.high - clustered.low > 2 * (independent.high - independent.low)
    paired = cluster_bootstrap([prompts + 1, prompts], clusters, lambda a, b: np.mean(a - b), seed=0, resamples=50)
    assert paired.value == pytest.approx(1) and paired.reason == "the statistic is the same in every resample"


@pytest.mark.parametrize(
    ("columns", "clusters", "words"),
    [
        ([[1.0, 2.0]], ["a"], "2 values but 1 clusters"),
        ([[1.0, 2.0], [1.0]], ["a", "b"], "give equally many"),
        ([[1.0, math.nan]], ["a", "b"], "entry 1 is nan"),
    ],
)
def test_bad_columns_are_refused(columns: list[list[float]], clusters: list[str], words: str):
    with pytest.raises(InputError, match=words):
        cluster_bootstrap(columns, clusters, np.mean, seed=0)

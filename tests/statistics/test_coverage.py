"""Coverage of the intervals in simulation: 95 % intervals hold the truth in 93 to 97 % of seeded trials."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats

from rlhf_jax.statistics import (
    Estimate,
    cluster_bootstrap,
    cluster_mean_interval,
    cluster_share_interval,
    compare_means,
    compare_seeds,
    compare_wins,
    group_table,
    join_on_ids,
    probability_of_improvement,
    seed_interval,
)

Trial = Callable[[np.random.Generator], tuple[Estimate, float]]


def share_of_hits(trial: Trial, trials: int) -> float:
    rng, hits = np.random.default_rng(7), []
    for _ in range(trials):
        estimate, truth = trial(rng)
        assert estimate.low is not None and estimate.high is not None
        hits.append(estimate.low <= truth <= estimate.high)
    return float(np.mean(hits))


def clustered_normals(rng: np.random.Generator, clusters: int) -> tuple[np.ndarray, list[int]]:
    labels = np.repeat(np.arange(clusters), rng.integers(1, 8, clusters))
    return rng.standard_normal(clusters)[labels] + rng.standard_normal(labels.size), labels.tolist()


def clustered_mean_trial(rng: np.random.Generator) -> tuple[Estimate, float]:
    return cluster_mean_interval(*clustered_normals(rng, 60)), 0.0


def clustered_share_trial(rng: np.random.Generator) -> tuple[Estimate, float]:
    labels, truth = np.repeat(np.arange(60), 4), rng.uniform(0.15, 0.85)
    shares = rng.beta(4 * truth, 4 * (1 - truth), 60)[labels]
    return cluster_share_interval((rng.random(labels.size) < shares).astype(float), labels.tolist()), truth


def share_trial(rng: np.random.Generator) -> tuple[Estimate, float]:
    truth = rng.uniform(0.05, 0.95)
    return cluster_share_interval((rng.random(60) < truth).astype(float), list(range(60))), truth


def paired_mean_trial(rng: np.random.Generator) -> tuple[Estimate, float]:
    prompts = rng.standard_normal(20)
    first, second = prompts + 0.3 + rng.standard_normal(20), prompts + rng.standard_normal(20)
    return compare_means(join_on_ids(list(enumerate(first)), list(enumerate(second)))).estimate, 0.3


def wins_trial(rng: np.random.Generator) -> tuple[Estimate, float]:
    first, second = rng.integers(0, 5, 60), rng.integers(0, 4, 60)
    truth = (10 + 0.5 * 4) / 20  # of the 20 pairs of (0 .. 4, 0 .. 3) 10 are won and 4 tied
    return compare_wins(join_on_ids(list(enumerate(first)), list(enumerate(second)))).estimate, truth


def seeds_trial(rng: np.random.Generator) -> tuple[Estimate, float]:
    return seed_interval(rng.standard_normal(3)), 0.0


def welch_trial(rng: np.random.Generator) -> tuple[Estimate, float]:
    return compare_seeds(rng.standard_normal(5), 3 * rng.standard_normal(8)), 0.0


def improvement_trial(rng: np.random.Generator) -> tuple[Estimate, float]:
    truth = float(scipy.stats.norm.cdf(1 / np.sqrt(2)))
    return probability_of_improvement(1 + rng.standard_normal(25), rng.standard_normal(25)), truth


def share_gap_trial(rng: np.random.Generator) -> tuple[Estimate, float]:
    groups = np.repeat(np.arange(3), (60, 90, 120))
    gap = group_table((rng.random(270) < 0.6).astype(float).tolist(), groups.tolist()).gap
    assert gap is not None
    return gap.difference, 0.0


def gap_trial(rng: np.random.Generator) -> tuple[Estimate, float]:
    groups = np.repeat(np.arange(3), (20, 30, 40))
    gap = group_table((np.array([1, 2, 3])[groups] * rng.standard_normal(90)).tolist(), groups.tolist()).gap
    assert gap is not None
    return gap.difference, 0.0


def against_others_trial(rng: np.random.Generator) -> tuple[Estimate, float]:
    """Return the estimate farthest from 0 in units of its width: all four hold 0 when it does."""
    groups = np.repeat(np.arange(4), (15, 25, 30, 40))
    table = group_table(rng.standard_normal(110).tolist(), groups.tolist())
    estimates = [group.against_others for group in table.groups if group.against_others is not None]
    return max(estimates, key=lambda estimate: abs(estimate.value) / ((estimate.high or 0) - (estimate.low or 0))), 0.0


def bootstrap_trial(rng: np.random.Generator) -> tuple[Estimate, float]:
    values, labels = clustered_normals(rng, 80)
    return cluster_bootstrap([values], labels, np.mean, seed=int(rng.integers(10**6)), resamples=600), 0.0


@pytest.mark.parametrize(
    "trial",
    [
        *(clustered_mean_trial, clustered_share_trial, share_trial, paired_mean_trial, wins_trial),
        *(seeds_trial, welch_trial, improvement_trial),
    ],
)
def test_intervals_cover_the_truth(trial: Trial):
    assert 0.93 <= share_of_hits(trial, 1000) <= 0.97


def test_the_gap_of_shares_covers_the_truth():
    assert 0.93 <= share_of_hits(share_gap_trial, 300) <= 0.97


def test_bootstrap_intervals_cover_the_truth():
    assert 0.92 <= share_of_hits(bootstrap_trial, 100) <= 0.98


@pytest.mark.slow
@pytest.mark.parametrize("trial", [share_gap_trial, gap_trial, against_others_trial, bootstrap_trial])
def test_costly_intervals_cover_the_truth(trial: Trial):
    assert 0.93 <= share_of_hits(trial, 800) <= 0.97

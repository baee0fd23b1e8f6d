"""Several seeds of one experiment: means with Student's t intervals, differences, and the probability of improvement.

The seed is the independent item: intervals over the prompts of one run say nothing about another seed of training.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
import scipy.special
import scipy.stats
from numpy.typing import ArrayLike

from rlhf_jax.errors import InputError
from rlhf_jax.statistics.estimate import (
    CONSTANT,
    Estimate,
    FloatArray,
    check_confidence,
    finite_vector,
    is_constant,
    symmetric_estimate,
    without_interval,
)

SINGLE_SEED = "a single seed"


@dataclasses.dataclass(frozen=True)
class SeedSummary:
    """A metric over the seeds of one experiment.

    mean: over the seeds that have the metric; None when none has it.
    deviation: sample standard deviation (n - 1 in the denominator); None with fewer than two seeds.
    missing: seeds without the metric, for instance of runs that stopped early. A mean without them may be too good.
    """

    mean: Estimate | None
    deviation: float | None
    missing: tuple[int, ...]


def seed_interval(values: ArrayLike, confidence: float = 0.95) -> Estimate:
    """Return the mean over seeds with Student's interval mean +- t(n - 1) * s / sqrt(n), s with n - 1 in the denominator.

    One seed, or values that are all the same: no interval.
    0.60, 0.64, 0.68: s = 0.04, t(2) = 4.302653, 0.64 +- 0.099365.
    """
    check_confidence(confidence)
    array = finite_vector(values, "seed_interval")
    mean, reason = float(array.mean()), _missing_spread(array)
    if reason:
        return without_interval(mean, array.size, confidence, reason)
    return symmetric_estimate(mean, float(scipy.stats.sem(array)), array.size - 1, array.size, confidence)


def _missing_spread(values: FloatArray) -> str:
    """Return why ``values`` have no spread; empty when they have one."""
    if values.size == 1:
        return SINGLE_SEED
    return CONSTANT if is_constant(values) else ""


def summarize_seeds(runs: Mapping[int, Mapping[str, float | None]], confidence: float = 0.95) -> dict[str, SeedSummary]:
    """Summarize the final metrics of runs that differ in their seed, a row for each metric that any run has.

    runs: seed -> metric -> value; None is missing. Raises InputError without runs.
    """
    if not runs:
        raise InputError("summarize_seeds: no runs; give the final metrics of at least one")
    names = sorted({name for metrics in runs.values() for name in metrics})
    return {name: _summary({seed: runs[seed].get(name) for seed in sorted(runs)}, confidence) for name in names}


def _summary(by_seed: Mapping[int, float | None], confidence: float) -> SeedSummary:
    values = [value for value in by_seed.values() if value is not None]
    missing = tuple(seed for seed, value in by_seed.items() if value is None)
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return SeedSummary(seed_interval(values, confidence) if values else None, deviation, missing)


def compare_seeds(first: ArrayLike, second: ArrayLike, confidence: float = 0.95) -> Estimate:
    """Return the difference of two experiments' means over their seeds, first minus second, with Welch's interval.

    first, second: a value for each seed; the seeds need not correspond and the numbers may differ (seeds that do: join them as
    record ids, ``join_on_ids`` and ``compare_means``). Degrees of freedom of
    Welch (1947) and Satterthwaite (1946). n counts the seeds of both. One seed on a side, or no spread on either: no interval.
    """
    check_confidence(confidence)
    x, y = (
        finite_vector(first, "compare_seeds (first)"),
        finite_vector(second, "compare_seeds (second)"),
    )
    difference, n = float(x.mean() - y.mean()), x.size + y.size
    if min(x.size, y.size) == 1:
        return without_interval(difference, n, confidence, SINGLE_SEED)
    parts = [0.0 if is_constant(side) else float(side.var(ddof=1)) / side.size for side in (x, y)]
    if sum(parts) == 0.0:
        return without_interval(difference, n, confidence, f"{CONSTANT} on both sides")
    degrees = welch_degrees((parts[0], x.size), (parts[1], y.size))
    return symmetric_estimate(difference, math.sqrt(sum(parts)), degrees, n, confidence)


def welch_degrees(*sides: tuple[float, int]) -> float:
    """Return the Welch-Satterthwaite degrees of freedom of a sum of variances.

    sides: (squared standard error, number of items) of each.
    """
    total = sum(square for square, _ in sides)
    return total**2 / sum(square**2 / (size - 1) for square, size in sides)


def probability_of_improvement(first: ArrayLike, second: ArrayLike, confidence: float = 0.95) -> Estimate:
    """Return P(X > Y) + P(X = Y) / 2 for independent draws of two sides, with its interval.

    first, second: independent values of each side, for instance final scores by seed (Agarwal et al. 2021, section 4.3).
    Variance of Brunner & Munzel (2000); normal interval on the logit scale, so that the bounds lie in (0, 1) (Perme & Manevski
    2019). With fewer than 10 values on a side it is wider than it need be. n counts both sides. One value on a side, or two
    sides that do not overlap (or never differ): no interval. For two policies on the same prompts take ``compare_wins``.
    [1, 2, 3] against [0, 2, 2]: 5 of 9 comparisons are won and 2 tied: 2 / 3.
    """
    check_confidence(confidence)
    x = finite_vector(first, "probability_of_improvement (first)")
    y = finite_vector(second, "probability_of_improvement (second)")
    shares_left, shares_right = _placements(x, y), _placements(y, x)
    share, n = float(shares_left.mean()), x.size + y.size
    if min(x.size, y.size) == 1:
        return without_interval(share, n, confidence, SINGLE_SEED)
    parts = [float(side.var(ddof=1)) / side.size for side in (shares_left, shares_right)]
    if sum(parts) == 0.0 or not 0.0 < share < 1.0:
        return without_interval(share, n, confidence, "the two sides do not overlap, or all their values are the same")
    half = float(scipy.special.ndtri(0.5 + confidence / 2)) * math.sqrt(sum(parts)) / (share * (1 - share))
    logit = float(scipy.special.logit(share))
    return Estimate(
        share, float(scipy.special.expit(logit - half)), float(scipy.special.expit(logit + half)), n, confidence
    )


def _placements(values: FloatArray, references: FloatArray) -> FloatArray:
    """Return for each of ``values`` the share of ``references`` below it, equal ones counted as half."""
    ordered = np.sort(references)
    below, up_to = (np.searchsorted(ordered, values, side=side) for side in ("left", "right"))
    return np.asarray((below + up_to) / (2 * references.size), np.float64)

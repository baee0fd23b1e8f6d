"""Means, shares and differences with confidence intervals, for comparisons of policies.

Everything is float64 on the host (numpy, scipy). Unless said otherwise an interval covers 95 % under its assumptions
and holds for the sampled prompts only, not for another seed of training (for that see `across_seeds`).
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import scipy.special
import scipy.stats
from numpy.typing import ArrayLike, NDArray

from rlhf_jax.errors import InputError
from rlhf_jax.statistics.estimate import finite_vector

FloatArray = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Interval:
    """An estimate with its confidence bounds, in the unit of the measurement.

    n: the number of independent items. low and high are NaN when the data cannot give bounds (one item), mean is
    NaN when the quantity itself is not identifiable.
    """

    mean: float
    low: float
    high: float
    n: int

    @property
    def above_zero(self) -> bool:
        """True when the whole interval lies above 0; False when there are no bounds."""
        return self.low > 0.0

    @property
    def below_zero(self) -> bool:
        """True when the whole interval lies below 0; False when there are no bounds."""
        return self.high < 0.0


@dataclasses.dataclass(frozen=True)
class LengthControlled:
    """A score difference at equal length.

    gain: the difference. slope: score per unit of extra length.
    extrapolated: True when all length differences have the same sign, so that "equal length" lies outside of the data and
    the gain is an extrapolation of the fitted line.
    """

    gain: Interval
    slope: float
    extrapolated: bool


def _pair(a: ArrayLike, b: ArrayLike, place: str) -> tuple[FloatArray, FloatArray]:
    first, second = finite_vector(a, f"{place} (first)"), finite_vector(b, f"{place} (second)")
    if first.size != second.size:
        raise InputError(f"{place}: {first.size} and {second.size} entries; give the same prompts in the same order")
    return first, second


def _check_confidence(confidence: float) -> None:
    if not 0.0 < confidence < 1.0:
        raise InputError(f"confidence = {confidence!r}: give a number between 0 and 1, for instance 0.95")


def mean_interval(values: ArrayLike, confidence: float = 0.95) -> Interval:
    """Return the mean with Student's t interval: mean +- t(n - 1) * s / sqrt(n), s with n - 1 in the denominator.

    values: [N] independent items, any unit. One item: NaN bounds. Raises InputError when empty or not finite.
    [1, 2, 3, 4]: s = 1.290994, t(3) = 3.182446, 2.5 +- 2.054260.
    """
    _check_confidence(confidence)
    array = finite_vector(values, "mean_interval")
    mean, n = float(array.mean()), array.size
    if n == 1:
        return Interval(mean, math.nan, math.nan, 1)
    half = float(scipy.stats.t.ppf(0.5 + confidence / 2, n - 1) * scipy.stats.sem(array))
    return Interval(mean, mean - half, mean + half, n)


def paired_difference(a: ArrayLike, b: ArrayLike, confidence: float = 0.95) -> Interval:
    """Return the mean of ``a - b`` over the same items in the same order, with the t interval of the differences.

    Pairing removes the variance of the prompts' difficulty: the interval is far narrower than that of two separate means.
    """
    first, second = _pair(a, b, "paired_difference")
    return mean_interval(first - second, confidence)


def bootstrap_interval(
    values: ArrayLike,
    *,
    seed: int,
    statistic: Callable[..., Any] = np.mean,
    resamples: int = 9999,
    confidence: float = 0.95,
) -> Interval:
    """Return ``statistic`` with its bias-corrected accelerated bootstrap interval (Efron 1987), for skewed statistics.

    values: [N]; for a paired comparison give the differences. statistic takes an ``axis`` (np.mean, np.median).
    The interval has no width when all data are equal; the bounds of one item are NaN. When leaving out any single item does
    not change the statistic (a median among equal numbers), the acceleration is undefined: the interval is then the
    percentile interval.
    """
    _check_confidence(confidence)
    array = finite_vector(values, "bootstrap_interval")
    point = float(statistic(array, axis=0))
    if array.size == 1:
        return Interval(point, math.nan, math.nan, 1)
    if np.ptp(array) == 0.0:
        return Interval(point, point, point, array.size)

    def bounds(method: str) -> tuple[float, float]:
        with np.errstate(invalid="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", scipy.stats.DegenerateDataWarning)
            interval = scipy.stats.bootstrap(
                (array,),
                statistic,
                n_resamples=resamples,
                confidence_level=confidence,
                method=method,
                rng=np.random.default_rng(seed),
            ).confidence_interval
        return float(interval.low), float(interval.high)

    low, high = bounds("BCa")
    if math.isnan(low) or math.isnan(high):
        low, high = bounds("percentile")
    return Interval(point, low, high, array.size)


def wilson_interval(successes: float, n: int, confidence: float = 0.95) -> Interval:
    """Return a proportion with Wilson's score interval (Wilson 1927), which is sensible at 0 and 1 and stays in [0, 1].

    successes: 0 .. n; halves are allowed (a tie), which makes the interval a little too wide, never too narrow.
    8 of 10: 0.8, [0.490162, 0.943318].
    """
    _check_confidence(confidence)
    if n < 1 or not 0 <= successes <= n:
        raise InputError(f"wilson_interval: {successes!r} successes of {n!r}: give 0 <= successes <= n and n >= 1")
    z = float(scipy.special.ndtri(0.5 + confidence / 2))
    share, shrink = successes / n, 1 + z * z / n
    centre = (share + z * z / (2 * n)) / shrink
    half = z / shrink * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # Rounding must not push the bounds past the estimate (0 of n: low is 0 up to 1e-17).
    return Interval(share, max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half)), n)


def paired_share_difference(a: ArrayLike, b: ArrayLike, confidence: float = 0.95) -> Interval:
    """Return share(a) - share(b) of the same items with Newcombe's interval for paired proportions.

    a, b: [N] of 0 and 1, the same items in the same order. The two Wilson intervals are squared and added, with the
    correlation of the pairs (Newcombe 1998, "Improved confidence intervals for the difference between binomial proportions
    based on paired data", method 10). It is sensible also where all pairs agree, where Student's interval has no width.
    Example: 36 items are 1 in both, 12 only in a, 2 only in b, 0 in neither: 0.2, [0.0569, 0.3404].
    """
    first, second = _pair(a, b, "paired_share_difference")
    if not (np.isin(first, (0.0, 1.0)).all() and np.isin(second, (0.0, 1.0)).all()):
        raise InputError("paired_share_difference: an entry is neither 0 nor 1; take paired_difference")
    share_a, share_b = (wilson_interval(float(side.sum()), side.size, confidence) for side in (first, second))
    correlation = _corrected_correlation(first, second)

    def half(below: float, above: float) -> float:
        return math.sqrt(max(below * below - 2 * correlation * below * above + above * above, 0.0))

    difference = float((first - second).mean())
    low = difference - half(share_a.mean - share_a.low, share_b.high - share_b.mean)
    high = difference + half(share_a.high - share_a.mean, share_b.mean - share_b.low)
    return Interval(difference, low, high, first.size)


def _corrected_correlation(first: FloatArray, second: FloatArray) -> float:
    """Return phi of a 2x2 table with Newcombe's continuity correction; 0 where a side never varies."""
    n = first.size
    n11, n10, n01 = (float(x.sum()) for x in (first * second, first * (1 - second), (1 - first) * second))
    n00 = n - n11 - n10 - n01
    margins = (n11 + n10) * (n01 + n00) * (n11 + n01) * (n10 + n00)
    if margins == 0:
        return 0.0
    determinant = n11 * n00 - n10 * n01
    if determinant > 0:
        determinant = max(determinant - n / 2, 0.0)
    return determinant / math.sqrt(margins)


def win_rate(a: ArrayLike, b: ArrayLike, confidence: float = 0.95) -> Interval:
    """Return the share of items on which ``a`` scores above ``b``, a tie counted as half a win; 0.5 = no preference."""
    first, second = _pair(a, b, "win_rate")
    wins = float((first > second).sum() + 0.5 * (first == second).sum())
    return wilson_interval(wins, first.size, confidence)


def length_controlled_difference(
    score_a: ArrayLike, score_b: ArrayLike, length_a: ArrayLike, length_b: ArrayLike, confidence: float = 0.95
) -> LengthControlled:
    """Estimate the gain of a over b at EQUAL length: the intercept of score difference regressed on length difference.

    score_a - score_b = gain + slope * (length_a - length_b) + noise, least squares over the N paired items, with the
    heteroscedasticity-robust HC1 standard error (MacKinnon & White 1985) and t(N - 2). The idea of comparing at equal
    length is length-controlled AlpacaEval's (Dubois et al. 2024), which fits a logistic model of a judge's preferences;
    this is its plain regression adjustment for scores on a scale. It adjusts for length and does not prove that
    length is a cause.

    When all lengths are equal, the gain is the ordinary paired difference. When all length differences are equal but not 0, or
    with fewer than three items, it is not identifiable: NaN. Example: differences [1, 2, 4] at length differences [0, 1, 2]
    have gain 5/6, slope 3/2.
    """
    _check_confidence(confidence)
    scores = np.subtract(*_pair(score_a, score_b, "length_controlled_difference: scores"))
    lengths = np.subtract(*_pair(length_a, length_b, "length_controlled_difference: lengths"))
    if scores.size != lengths.size:
        raise InputError(f"length_controlled_difference: {scores.size} scores but {lengths.size} lengths")
    n = scores.size
    if not lengths.any():
        return LengthControlled(mean_interval(scores, confidence), 0.0, False)
    extrapolated = bool(lengths.min() > 0 or lengths.max() < 0)
    if n < 3 or np.ptp(lengths) == 0.0:
        return LengthControlled(Interval(math.nan, math.nan, math.nan, n), math.nan, extrapolated)
    design = np.stack([np.ones(n), lengths], axis=1)
    bread = np.linalg.inv(design.T @ design)
    gain, slope = bread @ design.T @ scores
    residuals = scores - design @ np.array([gain, slope])
    meat = (design * residuals[:, None] ** 2).T @ design
    covariance = bread @ meat @ bread * n / (n - 2)
    half = float(scipy.stats.t.ppf(0.5 + confidence / 2, n - 2) * math.sqrt(max(covariance[0, 0], 0.0)))
    return LengthControlled(
        Interval(float(gain), float(gain) - half, float(gain) + half, n), float(slope), extrapolated
    )


def across_seeds(runs: Sequence[Mapping[str, float]], confidence: float = 0.95) -> dict[str, Interval]:
    """Return the mean of every metric over runs that differ in their seed, with the t interval over runs (n = runs).

    runs: the final metrics of each run, all with the same names. Raises InputError when the names differ and for no runs.
    """
    if not runs:
        raise InputError("across_seeds: no runs; give the final metrics of at least one")
    for index, run in enumerate(runs):
        if run.keys() != runs[0].keys():
            unequal = sorted(run.keys() ^ runs[0].keys())
            raise InputError(f"across_seeds: run {index} and run 0 differ in {unequal}; compare runs of one experiment")
    return {name: mean_interval([run[name] for run in runs], confidence) for name in sorted(runs[0])}

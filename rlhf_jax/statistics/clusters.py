"""Means and shares where several rows belong together: the responses of a prompt, the questions on a passage.

The cluster is the independent item. Intervals that take rows for independent are too narrow (Miller 2024, "Adding error
bars to evals"). A cluster needs no equal size. The sampling noise of responses is part of the spread between clusters and is
not added again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import scipy.special
import scipy.stats
from numpy.typing import ArrayLike, NDArray

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

IntArray = NDArray[np.int64]
Statistic = Callable[..., Any]
SINGLE = "a single cluster"


@dataclasses.dataclass(frozen=True)
class ClusteredMean:
    """A mean with its cluster-robust standard error, without an interval yet.

    error: standard error; None with a single cluster.
    rows, clusters: number of rows and of clusters.
    """

    value: float
    error: float | None
    rows: int
    clusters: int


def number_clusters(clusters: Sequence[Hashable], rows: int, place: str) -> IntArray:
    """Return [rows] the number of each row's cluster, 0, 1, ... in order of first appearance.

    Raises InputError when there is not one cluster for each of ``rows`` rows.
    """
    if len(clusters) != rows:
        raise InputError(f"{place}: {rows} values but {len(clusters)} clusters; give the cluster of every value")
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters], np.int64)


def clustered_mean(values: ArrayLike, clusters: Sequence[Hashable]) -> ClusteredMean:
    """Return the mean over rows with its cluster-robust standard error.

    values: [N]. clusters: [N], the prompt of each value.
    variance = C / (C - 1) * sum over clusters of (sum of the cluster's deviations)^2 / N^2: the sandwich estimator of a mean
    (Liang & Zeger 1986) with the correction for few clusters. With one row a cluster it is s^2 / N.
    """
    array = finite_vector(values, "clustered_mean")
    labels = number_clusters(clusters, array.size, "clustered_mean")
    count, mean = int(labels.max()) + 1, float(array.mean())
    if count == 1:
        return ClusteredMean(mean, None, array.size, 1)
    sums = np.bincount(labels, weights=array - mean)
    variance = 0.0 if is_constant(array) else count / (count - 1) * float(sums @ sums) / array.size**2
    return ClusteredMean(mean, math.sqrt(variance), array.size, count)


def cluster_mean_interval(values: ArrayLike, clusters: Sequence[Hashable], confidence: float = 0.95) -> Estimate:
    """Return the mean over rows with the cluster-robust interval mean +- t(C - 1) * error (``clustered_mean``).

    One cluster, or values that are all the same: no interval.
    [1, 3], [2, 6] of two prompts: mean 3, sums of deviations -2 and 2, error sqrt(2 * 8 / 16) = 1.
    """
    check_confidence(confidence)
    mean = clustered_mean(values, clusters)
    if mean.error is None:
        return without_interval(mean.value, 1, confidence, SINGLE)
    if mean.error == 0.0:
        return without_interval(mean.value, mean.clusters, confidence, _constant_reason(values))
    return symmetric_estimate(mean.value, mean.error, mean.clusters - 1, mean.clusters, confidence)


def _constant_reason(values: ArrayLike) -> str:
    return CONSTANT if is_constant(np.asarray(values, np.float64)) else "the clusters do not differ"


def effective_size(values: ArrayLike, clusters: Sequence[Hashable]) -> float | None:
    """Return how many independent 0/1 rows have the information of these clustered ones; None with a single cluster.

    N / design effect; the design effect (Kish 1965) is the cluster-robust variance over that of independent rows, at least
    1: at most N. Where all rows are equal the rows show no correlation, and the size is the number of clusters, the least
    that it can be.
    """
    array = finite_vector(values, "effective_size")
    mean = clustered_mean(array, clusters)
    if mean.error is None:
        return None
    if mean.clusters == mean.rows:
        return float(mean.rows)
    if mean.error == 0.0:
        return float(mean.clusters if is_constant(array) else mean.rows)
    independent = float(array.var(ddof=1)) / array.size
    return min(mean.rows * independent / mean.error**2, float(mean.rows))


def cluster_share_interval(values: ArrayLike, clusters: Sequence[Hashable], confidence: float = 0.95) -> Estimate:
    """Return a share with Wilson's interval at the effective number of rows.

    values: [N] of 0 and 1. clusters: [N], the prompt of each value.
    The effective size is that of ``effective_size`` times (z / t(C - 1))^2 for the uncertainty of the variance, as Korn &
    Graubard (1998) do for survey proportions. With one row a cluster it is N: Wilson's interval (Wilson 1927). One cluster:
    no interval. The bounds lie in [0, 1]. Raises InputError when a value is neither 0 nor 1.
    """
    check_confidence(confidence)
    array = finite_vector(values, "cluster_share_interval")
    if not is_binary(array):
        raise InputError("cluster_share_interval: an entry is neither 0 nor 1; take cluster_mean_interval")
    share, size, count = float(array.mean()), share_size(array, clusters, confidence), len(set(clusters))
    if size is None:
        return without_interval(share, 1, confidence, SINGLE)
    low, high = wilson_bounds(share, size, float(scipy.special.ndtri(0.5 + confidence / 2)))
    return Estimate(share, low, high, count, confidence)


def share_size(values: FloatArray, clusters: Sequence[Hashable], confidence: float) -> float | None:
    """Return the number of independent rows at which Wilson's interval of a clustered share is taken.

    ``effective_size``, times (z / t(C - 1))^2 where a cluster has several rows; None with a single cluster.
    """
    size, count = effective_size(values, clusters), len(set(clusters))
    if size is None or count == values.size:
        return size
    ratio = float(scipy.special.ndtri(0.5 + confidence / 2) / scipy.stats.t.ppf(0.5 + confidence / 2, count - 1))
    return size * ratio**2


def is_binary(values: FloatArray) -> bool:
    """Return whether every value is 0 or 1."""
    return bool(np.isin(values, (0.0, 1.0)).all())


def wilson_bounds(share: float, size: float, deviate: float) -> tuple[float, float]:
    """Return Wilson's score bounds of a share of ``size`` rows, which need not be a whole number.

    deviate: quantile of the normal distribution, 1.96 for 95 %.
    """
    square = deviate * deviate
    shrink = 1 + square / size
    centre = (share + square / (2 * size)) / shrink
    half = deviate / shrink * math.sqrt(share * (1 - share) / size + square / (4 * size * size))
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def cluster_bootstrap(
    columns: Sequence[ArrayLike],
    clusters: Sequence[Hashable],
    statistic: Statistic,
    *,
    seed: int,
    resamples: int = 4999,
    confidence: float = 0.95,
) -> Estimate:
    """Return ``statistic`` with its bias-corrected accelerated bootstrap interval, whole clusters resampled.

    columns: one or more lists [N]; a resampled row takes the values of all of them, so that paired columns stay paired.
    clusters: [N], the prompt of each row. statistic: called with the columns, returns a number, does not depend on the order
    of rows (``np.mean``, ``lambda a, b: np.median(a) - np.median(b)``).
    BCa of Efron (1987), the acceleration from leaving out a cluster at a time (Davison & Hinkley 1997, section 5.3). Where
    leaving out any cluster changes nothing the acceleration is 0. One cluster, a statistic that is the same in every
    resample, or one beyond all resamples: no interval.
    """
    check_confidence(confidence)
    arrays = [finite_vector(column, f"cluster_bootstrap (column {index})") for index, column in enumerate(columns)]
    if len({array.size for array in arrays}) != 1:
        raise InputError(f"cluster_bootstrap: columns of {[array.size for array in arrays]} rows; give equally many")
    labels = number_clusters(clusters, arrays[0].size, "cluster_bootstrap")
    count, point = int(labels.max()) + 1, float(statistic(*arrays))
    if count == 1:
        return without_interval(point, 1, confidence, SINGLE)

    def evaluate(counts: IntArray) -> FloatArray:
        """Return the statistic for each row of ``counts`` [R, C]: how often each cluster is in a resample."""
        repeats = (np.repeat(np.arange(labels.size), row[labels]) for row in counts)
        return np.array([float(statistic(*(array[rows] for array in arrays))) for rows in repeats])

    resampled = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
    distribution = np.sort(evaluate(resampled))
    if not np.isfinite(distribution).all():
        return without_interval(point, count, confidence, "the statistic is undefined in some resamples")
    if is_constant(distribution):
        return without_interval(point, count, confidence, "the statistic is the same in every resample")
    return _accelerated(point, distribution, evaluate(1 - np.eye(count, dtype=np.int64)), confidence)


def _accelerated(point: float, distribution: FloatArray, jackknife: FloatArray, confidence: float) -> Estimate:
    """Return the BCa interval from the sorted resamples and the leave-one-out statistics (Efron 1987, equation 6.5)."""
    below = float(((distribution < point).sum() + (distribution <= point).sum()) / (2 * distribution.size))
    if not 0.0 < below < 1.0:
        return without_interval(point, jackknife.size, confidence, "the estimate lies beyond all resamples")
    deviations = jackknife.mean() - jackknife
    spread = float((deviations**2).sum())
    constant = is_constant(jackknife) or not np.isfinite(jackknife).all()
    acceleration = 0.0 if constant else float((deviations**3).sum()) / (6 * spread**1.5)
    bias = float(scipy.special.ndtri(below))

    def quantile(deviate: float) -> float:
        shifted = bias + (bias + deviate) / (1 - acceleration * (bias + deviate))
        return float(np.quantile(distribution, scipy.special.ndtr(shifted)))

    deviate = float(scipy.special.ndtri(0.5 + confidence / 2))
    return Estimate(point, quantile(-deviate), quantile(deviate), jackknife.size, confidence)

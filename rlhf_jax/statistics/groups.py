"""A metric by a column of the record: means of groups, the gap between best and worst, each group against the others.

Bias between groups (a column that names whom a text is about) and quality by task or by source read the same table.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from rlhf_jax.errors import InputError
from rlhf_jax.statistics.clusters import (
    SINGLE,
    cluster_mean_interval,
    cluster_share_interval,
    is_binary,
    number_clusters,
    share_size,
    wilson_bounds,
)
from rlhf_jax.statistics.estimate import (
    CONSTANT,
    Estimate,
    FloatArray,
    check_confidence,
    finite_vector,
    is_constant,
    without_interval,
)
from rlhf_jax.statistics.reach import range_reach, student_reach
from rlhf_jax.statistics.seeds import welch_degrees

BoolArray = NDArray[np.bool_]


@dataclasses.dataclass(frozen=True)
class GroupMean:
    """A group's mean and its difference from all other groups' rows together.

    rows: number of rows.
    mean: with its own interval; for scores of 0 and 1 Wilson's.
    against_others: group minus others; the intervals of all groups together have the table's confidence (Bonferroni). None
    with a single group.
    """

    group: str
    rows: int
    mean: Estimate
    against_others: Estimate | None


@dataclasses.dataclass(frozen=True)
class GroupGap:
    """The gap between the best and the worst group: its estimate and bounds of the true gap, at least 0."""

    best: str
    worst: str
    difference: Estimate


@dataclasses.dataclass(frozen=True)
class GroupTable:
    """A metric by a column.

    groups: sorted by name. gap: None with fewer than two groups that are large enough.
    too_small: groups of a single cluster, which have a mean but take no part in the gap.
    without_group, without_score: number of rows that were left out.
    """

    groups: tuple[GroupMean, ...]
    gap: GroupGap | None
    too_small: tuple[str, ...]
    without_group: int
    without_score: int
    confidence: float


@dataclasses.dataclass(frozen=True)
class _Rows:
    """The scored rows: values [N], the number of each row's group [N] and of its cluster [N]."""

    values: FloatArray
    groups: NDArray[np.int64]
    clusters: NDArray[np.int64]
    names: tuple[str, ...]


def group_table(
    values: Sequence[float | None],
    groups: Sequence[str | int | None],
    clusters: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
) -> GroupTable:
    """Return the metric by group, with the gap between the groups and each group against the others.

    values: [N] scores; None is missing. groups: [N] the column's entries; None is missing. clusters: [N] the prompt or template
    of each row, which may reach over several groups; None: all rows are independent.

    The gap's bounds come from simultaneous intervals of all pairs (Tukey-Kramer with unequal variances, Games & Howell 1976):
    the true gap, the largest difference of true means, lies between the largest lower and the largest upper bound. Picking
    best and worst after looking does not make the interval too narrow, as it does with that of a t test.
    Raises InputError when lengths differ, a score is not finite or no row has both.
    """
    check_confidence(confidence)
    rows, without_group, without_score = _select_rows(values, groups, clusters)
    sizes = [len(np.unique(rows.clusters[rows.groups == index])) for index in range(len(rows.names))]
    large = [index for index, size in enumerate(sizes) if size > 1]
    means = tuple(_group_mean(rows, index, confidence) for index in range(len(rows.names)))
    return GroupTable(
        means,
        _gap(rows, large, confidence) if len(large) > 1 else None,
        tuple(name for name, size in zip(rows.names, sizes, strict=True) if size == 1),
        without_group,
        without_score,
        confidence,
    )


def _select_rows(
    values: Sequence[float | None], groups: Sequence[str | int | None], clusters: Sequence[Hashable] | None
) -> tuple[_Rows, int, int]:
    """Return the rows with group and score, and how many lack a group and, of the others, a score."""
    clusters = list(range(len(values))) if clusters is None else clusters
    if not len(values) == len(groups) == len(clusters):
        raise InputError(
            f"group_table: {len(values)} values, {len(groups)} groups, {len(clusters)} clusters; give equally many"
        )
    grouped = [index for index, group in enumerate(groups) if group is not None]
    scored = [index for index in grouped if values[index] is not None]
    if not scored:
        raise InputError(
            f"group_table: none of {len(values)} rows has both a group and a score; check the column's name"
        )
    labels = [str(groups[index]) for index in scored]
    names = tuple(sorted(set(labels)))
    rows = _Rows(
        finite_vector([float(value) for index in scored if (value := values[index]) is not None], "group_table"),
        np.array([names.index(label) for label in labels], np.int64),
        number_clusters([clusters[index] for index in scored], len(scored), "group_table"),
        names,
    )
    return rows, len(groups) - len(grouped), len(grouped) - len(scored)


def _group_mean(rows: _Rows, index: int, confidence: float) -> GroupMean:
    inside = rows.groups == index
    interval = cluster_share_interval if is_binary(rows.values) else cluster_mean_interval
    mean = interval(rows.values[inside], rows.clusters[inside].tolist(), confidence)
    against = None
    if len(rows.names) > 1:
        level = 1 - (1 - confidence) / len(rows.names)
        contrast = _contrast(rows, inside, ~inside, lambda degrees: student_reach(level, degrees))
        against = Estimate(contrast.value, contrast.low, contrast.high, contrast.n, confidence, contrast.reason)
    return GroupMean(rows.names[index], int(inside.sum()), mean, against)


def _gap(rows: _Rows, large: Sequence[int], confidence: float) -> GroupGap:
    """Return the gap between the groups ``large``, which have two clusters or more."""
    means = {index: float(rows.values[rows.groups == index].mean()) for index in large}
    best, worst = max(large, key=lambda index: means[index]), min(large, key=lambda index: means[index])
    value, n = means[best] - means[worst], len(np.unique(rows.clusters))
    contrasts = [
        _contrast(
            rows,
            rows.groups == first,
            rows.groups == second,
            lambda degrees: range_reach(confidence, len(large), degrees),
        )
        for first, second in itertools.permutations(large, 2)
    ]
    reasons = [contrast.reason for contrast in contrasts if contrast.reason]
    if reasons:
        estimate = without_interval(value, n, confidence, reasons[0])
    else:
        low = max(contrast.low for contrast in contrasts if contrast.low is not None)
        high = max(contrast.high for contrast in contrasts if contrast.high is not None)
        estimate = Estimate(value, max(low, 0.0), high, n, confidence)
    return GroupGap(rows.names[best], rows.names[worst], estimate)


@dataclasses.dataclass(frozen=True)
class _Contrast:
    """The difference of the means of two sets of rows with its bounds, or the reason why it has none. n: number of clusters."""

    value: float
    low: float | None
    high: float | None
    n: int
    reason: str = ""


Reach = Callable[[float], float]
"""Degrees of freedom -> number of standard errors between an estimate and its bounds."""


def _contrast(rows: _Rows, first: BoolArray, second: BoolArray, reach: Reach) -> _Contrast:
    """Return mean(first) - mean(second) with bounds; for shares whose clusters do not cross the sets those of Newcombe."""
    minuend, subtrahend = np.unique(rows.clusters[first]), np.unique(rows.clusters[second])
    shared = np.intersect1d(minuend, subtrahend).size > 0
    value = float(rows.values[first].mean() - rows.values[second].mean())
    n = int(np.union1d(minuend, subtrahend).size)
    if min(minuend.size, subtrahend.size) == 1:
        return _Contrast(value, None, None, n, SINGLE)
    if is_binary(rows.values) and not shared:
        below, above = _newcombe_reach(rows, first, second, reach(math.inf))
        return _Contrast(value, value - below, value + above, n)
    error, degrees = _contrast_error(rows, first, second, shared)
    if error == 0.0:
        return _Contrast(value, None, None, n, f"{CONSTANT} on both sides")
    half = reach(degrees) * error
    return _Contrast(value, value - half, value + half, n)


def _contrast_error(rows: _Rows, first: BoolArray, second: BoolArray, shared: bool) -> tuple[float, float]:
    """Return the cluster-robust standard error of a difference of means and its degrees of freedom.

    Sandwich variance over clusters, each side with its own correction C / (C - 1). Degrees of Welch and Satterthwaite; where
    clusters cross the sets the smaller number of clusters minus 1, as in a paired test.
    """
    count = int(rows.clusters.max()) + 1
    influences, sizes = [], []
    for side in (first, second):
        values, labels = rows.values[side], rows.clusters[side]
        size = np.unique(labels).size
        deviations = np.zeros_like(values) if is_constant(values) else (values - values.mean()) / values.size
        influences.append(np.bincount(labels, deviations, minlength=count) * math.sqrt(size / (size - 1)))
        sizes.append(size)
    error = math.sqrt(float(((influences[0] - influences[1]) ** 2).sum()))
    if shared or error == 0.0:
        return error, float(min(sizes) - 1)
    return error, welch_degrees(*((float(side @ side), size) for side, size in zip(influences, sizes, strict=True)))


def _newcombe_reach(rows: _Rows, first: BoolArray, second: BoolArray, deviate: float) -> tuple[float, float]:
    """Return how far the bounds of a difference of independent shares lie below and above it (Newcombe 1998, method 10)."""
    sides = []
    for side in (first, second):
        share = float(rows.values[side].mean())
        size = share_size(rows.values[side], rows.clusters[side].tolist(), 0.95)
        assert size is not None
        sides.append((share, *wilson_bounds(share, size, deviate)))
    (minuend, *minuend_bounds), (subtrahend, *subtrahend_bounds) = sides
    return (
        math.hypot(minuend - minuend_bounds[0], subtrahend_bounds[1] - subtrahend),
        math.hypot(minuend_bounds[1] - minuend, subtrahend - subtrahend_bounds[0]),
    )

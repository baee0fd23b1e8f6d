"""How good a reward model is, and what picking the best of n costs and brings."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import scipy.special
from numpy.typing import ArrayLike

from rlhf_jax.errors import InputError
from rlhf_jax.statistics.intervals import Interval, wilson_interval


@dataclasses.dataclass(frozen=True)
class CalibrationBin:
    """Predictions within [low, high): their mean, the share that came true with its interval, how many (n)."""

    low: float
    high: float
    n: int
    predicted: float
    observed: Interval


@dataclasses.dataclass(frozen=True)
class Calibration:
    """bins: the non-empty ones, ascending. error: expected calibration error, 0 = what is claimed is what happens."""

    bins: tuple[CalibrationBin, ...]
    error: float


def pairwise_accuracy(chosen: ArrayLike, rejected: ArrayLike) -> Interval:
    """Share of comparisons whose preferred reply scores STRICTLY higher, with Wilson's interval.

    chosen, rejected: [N] rewards. A tie is a mistake: a model that gives one number to everything has accuracy 0, not 1.
    """
    first, second = _rewards(chosen, rejected)
    return wilson_interval(int((first > second).sum()), first.size)


def calibration(predicted: ArrayLike, outcome: ArrayLike, *, bins: int = 10, low: float = 0.0) -> Calibration:
    """Claimed probability against what happened, in equally wide bins of [low, 1].

    predicted: [N] probabilities. outcome: [N] in [0, 1], 1 = it came true, 0.5 = a tie.
    error = sum over bins of n_bin / N * |mean predicted - mean outcome| (Guo et al. 2017, eq. 3).
    """
    claims, truths = np.asarray(predicted, np.float64), np.asarray(outcome, np.float64)
    if claims.ndim != 1 or claims.shape != truths.shape or claims.size == 0:
        raise InputError(
            f"calibration: shapes {claims.shape} and {truths.shape}; give two equally long, non-empty lists"
        )
    if bins < 1:
        raise InputError(f"calibration: bins = {bins}; give at least 1")
    if not (np.all((claims >= low) & (claims <= 1)) and np.all((truths >= 0) & (truths <= 1))):
        raise InputError(f"calibration: predicted must lie in [{low}, 1] and outcome in [0, 1]")
    edges = np.linspace(low, 1.0, bins + 1)
    which = np.clip(np.searchsorted(edges, claims, side="right") - 1, 0, bins - 1)
    found = []
    for index in range(bins):
        inside = which == index
        count = int(inside.sum())
        if count:
            observed = wilson_interval(float(truths[inside].sum()), count)
            found.append(
                CalibrationBin(
                    float(edges[index]), float(edges[index + 1]), count, claims[inside].mean().item(), observed
                )
            )
    error = sum(each.n * abs(each.predicted - each.observed.mean) for each in found) / claims.size
    return Calibration(tuple(found), error)


def preference_calibration(chosen: ArrayLike, rejected: ArrayLike, *, bins: int = 5) -> Calibration:
    """Calibration of a Bradley-Terry reward model: its confidence sigmoid(|difference|) against how often it is right.

    chosen, rejected: [N] rewards on the model's own scale. Confidence lies in [0.5, 1]; a tie is half right.
    """
    first, second = _rewards(chosen, rejected)
    confidence = scipy.special.expit(np.abs(first - second))
    right = (first > second) + 0.5 * (first == second)
    return calibration(confidence, right, bins=bins, low=0.5)


def expected_max(rewards: ArrayLike, n: int) -> float:
    """Unbiased estimate of E[the best of n] from N >= n samples of one prompt.

    sum over i of C(i - 1, n - 1) / C(N, n) * r_(i), r_(1) <= ... <= r_(N): the mean over all subsets of size n of their
    maximum (as pass@k of Chen et al. 2021). rewards [1, 2, 4], n = 2: (2 + 4 + 4) / 3.
    """
    ordered = np.sort(np.asarray(rewards, np.float64))
    total = ordered.size
    if ordered.ndim != 1 or not 1 <= n <= total:
        raise InputError(f"expected_max: the best of {n} from {total} samples; give 1 <= n <= samples")
    if not np.isfinite(ordered).all():
        raise InputError("expected_max: a reward is not finite; drop or repair it")
    # The weight of rank N is n / N, and C(i - 2, n - 1) = C(i - 1, n - 1) * (i - n) / (i - 1): no large factorials.
    ranks = np.arange(total, 1, -1)
    weights = n / total * np.cumprod(np.concatenate([[1.0], (ranks - n) / (ranks - 1)]))
    # The product hits 0 at rank n and must stay there.
    weights[total - n + 1 :] = 0.0
    return float(weights @ ordered[::-1])


def best_of_n_kl_bound(n: int) -> float:
    """Upper bound on KL(best of n || policy) in nats: log n - (n - 1) / n (Beirami et al. 2024 show it is a bound)."""
    if n < 1:
        raise InputError(f"best_of_n_kl_bound: n = {n}; give at least 1")
    return math.log(n) - (n - 1) / n


def _rewards(chosen: ArrayLike, rejected: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    first, second = np.asarray(chosen, np.float64), np.asarray(rejected, np.float64)
    if first.ndim != 1 or first.shape != second.shape or first.size == 0:
        raise InputError(f"chosen {first.shape} and rejected {second.shape}: give one reward each per comparison")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise InputError("chosen or rejected: a reward is not finite; the reward model is broken")
    return first, second

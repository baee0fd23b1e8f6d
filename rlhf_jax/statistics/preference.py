"""Accuracy and calibration of reward models; expected reward and KL of best-of-n sampling."""

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
    """The predictions in [low, high): n of them, their mean, and the share of true outcomes with its interval."""

    low: float
    high: float
    n: int
    predicted: float
    observed: Interval


@dataclasses.dataclass(frozen=True)
class Calibration:
    """The calibration of predictions. bins: the non-empty ones, ascending. error: the expected calibration error, 0 at best."""

    bins: tuple[CalibrationBin, ...]
    error: float


def pairwise_accuracy(chosen: ArrayLike, rejected: ArrayLike) -> Interval:
    """Return the share of comparisons whose chosen response scores STRICTLY higher, with Wilson's interval.

    chosen, rejected: [N] rewards. A tie is a mistake: a model with the same reward for every response has accuracy 0, not 1.
    """
    first, second = _rewards(chosen, rejected)
    return wilson_interval(int((first > second).sum()), first.size)


def calibration(predicted: ArrayLike, outcome: ArrayLike, *, bins: int = 10, low: float = 0.0) -> Calibration:
    """Compare predicted probabilities with outcomes, in equally wide bins of [low, 1].

    predicted: [N] probabilities. outcome: [N] in [0, 1], 1 = true, 0.5 = a tie.
    error = sum over bins of n_bin / N * |mean predicted - mean outcome| (Guo et al. 2017, eq. 3).
    """
    probabilities, outcomes = np.asarray(predicted, np.float64), np.asarray(outcome, np.float64)
    if probabilities.ndim != 1 or probabilities.shape != outcomes.shape or probabilities.size == 0:
        raise InputError(
            f"calibration: shapes {probabilities.shape} and {outcomes.shape}; give two equally long, non-empty lists"
        )
    if bins < 1:
        raise InputError(f"calibration: bins = {bins}; give at least 1")
    valid = np.all((probabilities >= low) & (probabilities <= 1)) and np.all((outcomes >= 0) & (outcomes <= 1))
    if not valid:
        raise InputError(f"calibration: predicted must lie in [{low}, 1] and outcome in [0, 1]")
    edges = np.linspace(low, 1.0, bins + 1)
    bin_of = np.clip(np.searchsorted(edges, probabilities, side="right") - 1, 0, bins - 1)
    entries = []
    for index in range(bins):
        inside = bin_of == index
        count = int(inside.sum())
        if count:
            observed = wilson_interval(float(outcomes[inside].sum()), count)
            mean = probabilities[inside].mean().item()
            entries.append(CalibrationBin(float(edges[index]), float(edges[index + 1]), count, mean, observed))
    error = sum(entry.n * abs(entry.predicted - entry.observed.mean) for entry in entries) / probabilities.size
    return Calibration(tuple(entries), error)


def preference_calibration(chosen: ArrayLike, rejected: ArrayLike, *, bins: int = 5) -> Calibration:
    """Return the calibration of a Bradley-Terry reward model: its confidence sigmoid(|difference|) and its accuracy.

    chosen, rejected: [N] rewards on the model's own scale. Confidence lies in [0.5, 1]; a tie is half right.
    """
    first, second = _rewards(chosen, rejected)
    confidence = scipy.special.expit(np.abs(first - second))
    right = (first > second) + 0.5 * (first == second)
    return calibration(confidence, right, bins=bins, low=0.5)


def expected_max(rewards: ArrayLike, n: int) -> float:
    """Return the unbiased estimate of E[the best of n] from N >= n samples of one prompt.

    sum over i of C(i - 1, n - 1) / C(N, n) * r_(i), r_(1) <= ... <= r_(N): the mean over all subsets of size n of their
    maximum (as pass@k of Chen et al. 2021). Example: rewards [1, 2, 4], n = 2: (2 + 4 + 4) / 3.
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
    """Return the upper bound log n - (n - 1) / n on KL(best of n || policy) in nats (a bound by Beirami et al. 2024)."""
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

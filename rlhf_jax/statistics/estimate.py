"""Estimates whose interval may be undefined, and the sentences that report them.

An interval that the data cannot give is None with a reason, in the code, in JSON (``null``) and in words.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import scipy.stats
from numpy.typing import ArrayLike, NDArray

from rlhf_jax.errors import InputError

FloatArray = NDArray[np.float64]
CONSTANT = "all values are the same"


@dataclasses.dataclass(frozen=True)
class Estimate:
    """An estimate with its confidence interval, where the data define one.

    value: in the unit of the measured quantity.
    low, high: bounds of the interval, or both None.
    n: number of independent items that the estimate rests on (prompts, clusters, seeds).
    confidence: nominal coverage of the interval.
    reason: why there is no interval; empty when there is one.

    Raises InputError when a number is not finite or when bounds and reason contradict each other.
    """

    value: float
    low: float | None
    high: float | None
    n: int
    confidence: float = 0.95
    reason: str = ""

    def __post_init__(self) -> None:
        bounds = [bound for bound in (self.low, self.high) if bound is not None]
        if not all(map(math.isfinite, [self.value, *bounds])):
            raise InputError(
                f"Estimate: {self.value}, {bounds}: a number is not finite; leave an undefined interval None"
            )
        if len(bounds) == 1 or bool(bounds) == bool(self.reason):
            raise InputError("Estimate: give both bounds, or neither and the reason")

    @property
    def has_interval(self) -> bool:
        """Whether the data define an interval."""
        return self.low is not None

    @property
    def above_zero(self) -> bool:
        """Whether the whole interval lies above 0 (False without an interval)."""
        return self.low is not None and self.low > 0.0

    @property
    def below_zero(self) -> bool:
        """Whether the whole interval lies below 0 (False without an interval)."""
        return self.high is not None and self.high < 0.0


def without_interval(value: float, n: int, confidence: float, reason: str) -> Estimate:
    """Return an estimate that has no interval because of ``reason``."""
    return Estimate(float(value), None, None, n, confidence, reason)


def symmetric_estimate(value: float, error: float, degrees: float, n: int, confidence: float) -> Estimate:
    """Return ``value`` +- t(degrees) * error, Student's t interval.

    error: standard error, greater than 0.
    degrees: degrees of freedom; infinity gives the normal interval.
    """
    half = float(scipy.stats.t.ppf(0.5 + confidence / 2, degrees)) * error
    return Estimate(float(value), float(value) - half, float(value) + half, n, confidence)


def finite_vector(values: ArrayLike, place: str) -> FloatArray:
    """Return ``values`` as a float64 vector. Raises InputError that names ``place`` when it is empty or not finite."""
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or array.size == 0:
        raise InputError(f"{place}: expected a non-empty one-dimensional list of numbers, got shape {array.shape}")
    bad = np.flatnonzero(~np.isfinite(array))
    if bad.size:
        raise InputError(f"{place}: entry {bad[0]} is {array[bad[0]]}; drop or repair it before averaging")
    return array


def check_confidence(confidence: float) -> None:
    """Raise InputError unless ``confidence`` lies between 0 and 1."""
    if not 0.0 < confidence < 1.0:
        raise InputError(f"confidence = {confidence!r}: give a number between 0 and 1, for instance 0.95")


def is_constant(values: FloatArray) -> bool:
    """Return whether all ``values`` are the same up to rounding of float64 arithmetic (0.1 + 0.2 and 0.3)."""
    return bool(np.ptp(values) <= 8 * np.finfo(np.float64).eps * np.abs(values).max())


def describe(name: str, estimate: Estimate, *, unit: str = "prompts", digits: int = 3) -> str:
    """Return a sentence that reports ``estimate``; it speaks of an interval only where there is one.

    unit: plural noun for the independent items.
    "accuracy is 0.610 (95 % interval 0.540 to 0.676; 200 prompts)." or
    "accuracy is 0.610 (no interval: a single seed)."
    """
    return f"{name} is {estimate.value:.{digits}f} ({_describe_bounds(estimate, unit, digits, '')})."


def describe_difference(
    first: str, second: str, metric: str, estimate: Estimate, *, unit: str = "prompts", digits: int = 3
) -> str:
    """Return a sentence on the difference ``first`` minus ``second`` of ``metric``.

    It claims that a side scores higher only where the whole interval lies on that side of 0. Without an interval it says
    that the data cannot tell, and why.
    """
    bounds = _describe_bounds(estimate, unit, digits, "+")
    difference = f"{metric} differs by {estimate.value:+.{digits}f} between {first} and {second} ({bounds})"
    if not estimate.has_interval:
        return f"{difference}; these data cannot tell whether that is chance."
    if estimate.above_zero:
        return f"{first} scores higher than {second}: {difference}."
    if estimate.below_zero:
        return f"{first} scores lower than {second}: {difference}."
    return f"{difference}; neither side is shown to score higher."


def _describe_bounds(estimate: Estimate, unit: str, digits: int, sign: str) -> str:
    if not estimate.has_interval:
        return f"no interval: {estimate.reason}"
    form = f"{sign}.{digits}f"
    level = f"{100 * estimate.confidence:.10g} %"
    return f"{level} interval {estimate.low:{form}} to {estimate.high:{form}}; {estimate.n} {unit}"

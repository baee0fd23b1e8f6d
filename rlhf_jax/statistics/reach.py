"""Numbers of standard errors that lie between an estimate and its bounds: Student's t and the studentized range."""

from __future__ import annotations

import functools
import math

import numpy as np
import scipy.optimize
import scipy.special
import scipy.stats

from rlhf_jax.statistics.estimate import FloatArray

NODES = 64
"""Number of quadrature nodes: probabilities have errors below 1e-4."""


def student_reach(confidence: float, degrees: float) -> float:
    """Return the two-sided quantile of Student's t distribution: 1.96 for 95 % and infinite degrees of freedom."""
    return float(scipy.stats.t.ppf(0.5 + confidence / 2, degrees))


def scale_nodes(degrees: float) -> tuple[FloatArray, FloatArray]:
    """Return nodes [Q] and weights [Q] of the distribution of s / sigma, an estimated over the true standard deviation.

    s^2 / sigma^2 is chi-squared over ``degrees``. Gauss-Legendre quadrature over its quantiles; infinity: the node 1.
    """
    if math.isinf(degrees):
        return np.ones(1), np.ones(1)
    places, weights = np.polynomial.legendre.leggauss(NODES)
    quantiles = scipy.special.gammaincinv(degrees / 2, (places + 1) / 2)
    return np.asarray(np.sqrt(2 * quantiles / degrees)), np.asarray(weights / 2)


@functools.lru_cache(maxsize=4096)
def range_reach(confidence: float, groups: int, degrees: float) -> float:
    """Return the reach of simultaneous intervals of all differences of ``groups`` means.

    The quantile of the studentized range (Tukey 1953) over sqrt(2): with two groups Student's.
    ``scipy.stats.studentized_range`` gives the same and takes a second for a quantile.
    """
    if groups == 2:
        return student_reach(confidence, degrees)
    scales, weights = scale_nodes(degrees)

    def excess(width: float) -> float:
        return float(weights @ _range_probability(width * scales, groups)) - confidence

    upper = 4.0
    while excess(upper) < 0:
        upper *= 2
    return float(scipy.optimize.brentq(excess, 0.0, upper, xtol=1e-10)) / math.sqrt(2)


def _range_probability(widths: FloatArray, groups: int) -> FloatArray:
    """Return P(range of ``groups`` standard normal numbers <= width): k * integral of phi(z) (Phi(z) - Phi(z - width))^(k - 1)."""
    points = np.linspace(-8.0, 8.0, 81)
    inside = scipy.special.ndtr(points) - scipy.special.ndtr(points - widths[:, None])
    density = np.exp(-(points**2) / 2) / math.sqrt(2 * math.pi)
    return np.asarray(groups * (points[1] - points[0]) * (inside ** (groups - 1) @ density))

"""The smallest difference that a paired comparison can show, and how many prompts a difference needs.

Both take the power of the two-sided paired t test (Cohen 1988, chapter 2).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Mapping

import scipy.optimize
import scipy.special

from rlhf_jax.errors import InputError, require_number, require_whole
from rlhf_jax.statistics.clusters import clustered_mean
from rlhf_jax.statistics.estimate import check_confidence
from rlhf_jax.statistics.paired import Pairs, RecordId, cluster_of_pairs
from rlhf_jax.statistics.reach import scale_nodes, student_reach

MOST_PROMPTS = 10**9


@dataclasses.dataclass(frozen=True)
class Detectable:
    """A difference that a paired comparison detects with a given power.

    difference: in the unit of the score, greater than 0.
    prompts: number of prompts.
    deviation: standard deviation of a prompt's difference.
    power: probability that the interval at ``confidence`` excludes 0 if the true difference is ``difference``.
    """

    difference: float
    prompts: int
    deviation: float
    power: float
    confidence: float


def paired_power(difference: float, deviation: float, prompts: int, confidence: float = 0.95) -> float:
    """Return the power of the two-sided paired t test.

    difference: the true one. deviation: standard deviation of the differences, greater than 0. prompts: at least 2.
    P(|T| > t(n - 1)) for T noncentral t with n - 1 degrees of freedom and noncentrality difference / deviation * sqrt(n),
    integrated over the estimated deviation (``scale_nodes``).
    """
    check_confidence(confidence)
    require_whole("prompts", prompts, 2)
    check_deviation(deviation)
    degrees, shift = prompts - 1, abs(difference) / deviation * math.sqrt(prompts)
    critical = student_reach(confidence, degrees)
    scales, weights = scale_nodes(degrees)
    tails = scipy.special.ndtr(shift - critical * scales) + scipy.special.ndtr(-shift - critical * scales)
    return min(float(weights @ tails), 1.0)


def detectable_difference(
    deviation: float, prompts: int, *, power: float = 0.8, confidence: float = 0.95
) -> Detectable:
    """Return the minimum detectable effect: the smallest difference that ``prompts`` prompts show with ``power``.

    deviation: standard deviation of the differences. 512 prompts with a deviation of 0.25 show 0.031.
    """
    check_power(power, confidence)
    reach = 1.0
    while paired_power(reach * deviation, deviation, prompts, confidence) < power:
        reach *= 2
    ratio = scipy.optimize.brentq(
        lambda ratio: paired_power(ratio * deviation, deviation, prompts, confidence) - power, 0.0, reach, xtol=1e-12
    )
    return Detectable(float(ratio) * deviation, prompts, deviation, power, confidence)


def detectable_in_pairs(
    pairs: Pairs,
    prompts: Mapping[RecordId, Hashable] | None = None,
    *,
    power: float = 0.8,
    confidence: float = 0.95,
) -> Detectable | None:
    """Return the minimum detectable effect at the sample of ``pairs``; None where the differences have no spread.

    prompts: the prompt of each record id where several belong to one; the deviation is then that of a prompt, the
    cluster-robust standard error times the square root of the number of prompts.
    """
    mean = clustered_mean(pairs.first - pairs.second, cluster_of_pairs(pairs, prompts))
    if not mean.error:
        return None
    return detectable_difference(
        mean.error * math.sqrt(mean.clusters), mean.clusters, power=power, confidence=confidence
    )


def prompts_needed(difference: float, deviation: float, *, power: float = 0.8, confidence: float = 0.95) -> Detectable:
    """Return the least number of prompts with which ``difference`` is shown with at least ``power``.

    A difference of half a deviation needs 34 prompts, of 0.2 deviations 199. The result holds the power reached. Raises
    InputError when more than a thousand million would be needed.
    """
    check_power(power, confidence)
    check_deviation(deviation)
    if not math.isfinite(difference) or difference == 0:
        raise InputError(f"difference = {difference!r}: give a finite number other than 0")
    few, many = 1, 2
    while paired_power(difference, deviation, many, confidence) < power:
        few, many = many, 2 * many
        if many > MOST_PROMPTS:
            raise InputError(f"difference = {difference!r}: needs more than {MOST_PROMPTS} prompts; give a larger one")
    while many - few > 1:
        middle = (few + many) // 2
        if paired_power(difference, deviation, middle, confidence) < power:
            few = middle
        else:
            many = middle
    return Detectable(
        abs(difference), many, deviation, paired_power(difference, deviation, many, confidence), confidence
    )


def describe_detectable(detectable: Detectable, metric: str, digits: int = 3) -> str:
    """Return a sentence such as "512 prompts can show a difference in reward of 0.031 (80 % power, 95 % interval)."."""
    return (
        f"{detectable.prompts} prompts can show a difference in {metric} of {detectable.difference:.{digits}f} "
        f"({100 * detectable.power:.3g} % power, {100 * detectable.confidence:.10g} % interval)."
    )


def check_deviation(deviation: float) -> None:
    """Raise InputError unless ``deviation`` is finite and greater than 0."""
    if not 0 < deviation < math.inf:
        raise InputError(f"deviation = {deviation!r}: give the standard deviation of the differences, greater than 0")


def check_power(power: float, confidence: float) -> None:
    """Raise InputError unless ``power`` is one that a positive difference can have: above 1 - confidence, below 1."""
    check_confidence(confidence)
    require_number("power", power, 0.0, 1.0)
    if not 1 - confidence < power < 1:
        raise InputError(f"power = {power!r}: give a number above {1 - confidence:.3g} and below 1, for instance 0.8")

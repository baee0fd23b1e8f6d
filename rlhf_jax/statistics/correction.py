"""Corrections of p-values for many comparisons at once.

A comparison without a p-value (None: not computed) keeps None and does not count as a comparison.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from rlhf_jax.errors import InputError
from rlhf_jax.statistics.estimate import FloatArray


@dataclasses.dataclass(frozen=True)
class CorrectedValue:
    """A p-value before and after correction for all comparisons; None where it was not computed."""

    value: float | None
    corrected: float | None


def correct_holm(values: Mapping[str, float | None]) -> dict[str, CorrectedValue]:
    """Correct p-values so that the chance of any false claim is bounded (Holm 1979), without assumptions on dependence.

    values: comparison -> p-value. The i-th smallest of m becomes the largest of (m - j + 1) * p_(j) over j <= i, at most 1.
    0.01, 0.04, 0.03 become 0.03, 0.06, 0.06. Raises InputError when a p-value lies outside of [0, 1].
    """

    def step_down(ordered: FloatArray) -> FloatArray:
        factors = np.arange(ordered.size, 0, -1)
        return np.minimum(np.maximum.accumulate(factors * ordered), 1.0)

    return _correct(values, step_down)


def correct_benjamini_hochberg(values: Mapping[str, float | None]) -> dict[str, CorrectedValue]:
    """Correct p-values so that the expected share of false claims among the claims is bounded (Benjamini & Hochberg 1995).

    values: comparison -> p-value. The i-th smallest of m becomes the least of m / j * p_(j) over j >= i, at most 1. Holds for
    independent or positively dependent comparisons. 0.01, 0.04, 0.03 become 0.03, 0.04, 0.04. Raises InputError when a
    p-value lies outside of [0, 1].
    """

    def step_up(ordered: FloatArray) -> FloatArray:
        scaled = ordered.size / np.arange(1, ordered.size + 1) * ordered
        return np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1.0)

    return _correct(values, step_up)


def _correct(
    values: Mapping[str, float | None], correct_ordered: Callable[[FloatArray], FloatArray]
) -> dict[str, CorrectedValue]:
    computed = {name: value for name, value in values.items() if value is not None}
    for name, value in computed.items():
        if not 0.0 <= value <= 1.0:
            raise InputError(f"the p-value of {name!r} is {value!r}: give a number in [0, 1], or None if not computed")
    names = sorted(computed, key=lambda name: computed[name])
    corrected = correct_ordered(np.array([computed[name] for name in names], np.float64))
    by_name = dict(zip(names, corrected.tolist(), strict=True))
    return {name: CorrectedValue(value, by_name.get(name)) for name, value in values.items()}

"""Power of paired comparisons against published sample sizes and scipy's noncentral t distribution."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from rlhf_jax.errors import InputError
from rlhf_jax.statistics import (
    describe_detectable,
    detectable_difference,
    detectable_in_pairs,
    join_on_ids,
    paired_power,
    prompts_needed,
)


@pytest.mark.parametrize(("ratio", "prompts"), [(0.2, 199), (0.5, 34), (0.8, 15)])
def test_prompts_of_cohens_small_medium_and_large_effects(ratio: float, prompts: int):
    """Sample sizes that G*Power gives for 80 % power, two-sided, 5 %."""
    needed = prompts_needed(-ratio, 1.0)
    assert needed.prompts == prompts and needed.power >= 0.8
    assert paired_power(ratio, 1.0, prompts - 1) < 0.8


@pytest.mark.parametrize("prompts", [2, 3, 10, 500])
def test_power_is_that_of_the_noncentral_t(prompts: int):
    critical = scipy.stats.t.ppf(0.975, prompts - 1)
    for shift in (0.0, 0.5, 2.5):
        tails = scipy.stats.nct(prompts - 1, shift)
        expected = tails.sf(critical) + tails.cdf(-critical)
        assert paired_power(shift / prompts**0.5, 1.0, prompts) == pytest.approx(expected, abs=2e-5)


def test_detectable_difference_is_the_inverse():
    for prompts in (15, 512):
        detectable = detectable_difference(0.25, prompts)
        assert prompts_needed(detectable.difference * 1.0001, 0.25).prompts == prompts
    assert detectable.difference == pytest.approx(0.0310, abs=5e-5)
    words = "512 prompts can show a difference in reward of 0.031 (80 % power, 95 % interval)."
    assert describe_detectable(detectable, "reward") == words


def test_pairs_give_their_own_deviation_and_number():
    scores = np.random.default_rng(0).standard_normal((2, 40))
    first, second = ([(index, float(x)) for index, x in enumerate(side)] for side in scores)
    expected = detectable_difference(float((scores[0] - scores[1]).std(ddof=1)), 40)
    detectable = detectable_in_pairs(join_on_ids(first, second))
    assert detectable is not None and detectable.difference == pytest.approx(expected.difference)
    assert detectable_in_pairs(join_on_ids(first, first)) is None
    clustered = detectable_in_pairs(join_on_ids(first, second), {index: index // 4 for index in range(40)})
    assert clustered is not None and clustered.prompts == 10


@pytest.mark.parametrize(
    ("difference", "deviation", "power", "words"),
    [
        (0.0, 1.0, 0.8, "difference = 0.0"),
        (0.1, 0.0, 0.8, "deviation = 0.0"),
        (0.1, 1.0, 0.05, "power = 0.05"),
        (1e-9, 1.0, 0.8, "needs more than"),
    ],
)
def test_impossible_demands_are_refused(difference: float, deviation: float, power: float, words: str):
    with pytest.raises(InputError, match=words):
        prompts_needed(difference, deviation, power=power)

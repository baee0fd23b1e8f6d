"""Corrected p-values against hand-worked numbers and scipy."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from rlhf_jax.errors import InputError
from rlhf_jax.statistics import CorrectedValue, correct_benjamini_hochberg, correct_holm

# Benjamini & Hochberg 1995, section 3.2: at 0.05 Bonferroni and Holm claim 3 of 15, Benjamini and Hochberg 4.
PUBLISHED = [
    *(0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344, 0.0459, 0.3240),
    *(0.4262, 0.5719, 0.6528, 0.7590, 1.0),
]


def test_three_comparisons_by_hand():
    values = {"a": 0.01, "b": 0.04, "c": 0.03}
    assert [value.corrected for value in correct_holm(values).values()] == pytest.approx([0.03, 0.06, 0.06])
    hochberg = correct_benjamini_hochberg(values)
    assert [value.corrected for value in hochberg.values()] == pytest.approx([0.03, 0.04, 0.04])


def test_the_published_example_claims_three_and_four():
    values = {str(index): value for index, value in enumerate(PUBLISHED)}
    for correct, claims in ((correct_holm, 3), (correct_benjamini_hochberg, 4)):
        assert (
            sum(value.corrected <= 0.05 for value in correct(values).values() if value.corrected is not None) == claims
        )


def test_false_discovery_rate_is_scipys():
    ps = np.random.default_rng(0).random(40) ** 2
    values = correct_benjamini_hochberg({str(index): float(p) for index, p in enumerate(ps)})
    assert [value.corrected for value in values.values()] == pytest.approx(scipy.stats.false_discovery_control(ps))


def test_a_value_that_is_not_computed_spoils_no_other():
    for correct in (correct_holm, correct_benjamini_hochberg):
        values = correct({"a": 0.02, "none": None, "b": 0.5})
        assert values["none"] == CorrectedValue(None, None)
        assert values["a"] == CorrectedValue(0.02, 0.04)
        assert correct({}) == {}


@pytest.mark.parametrize("value", [float("nan"), -0.1, 1.1])
def test_impossible_values_are_refused(value: float):
    with pytest.raises(InputError, match="the p-value of 'a'"):
        correct_holm({"a": value})

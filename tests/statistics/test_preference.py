"""Accuracy and calibration of reward models, and the best of n, against enumeration and simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.statistics import (
    best_of_n_kl_bound,
    calibration,
    expected_max,
    pairwise_accuracy,
    preference_calibration,
    wilson_interval,
)


def test_a_tie_is_a_mistake():
    assert pairwise_accuracy([1, 2, 3, 0], [0, 2, 4, -1]) == wilson_interval(2, 4)
    assert pairwise_accuracy([0.0] * 5, [0.0] * 5).mean == 0.0


def test_calibration_by_hand():
    """Bins of width .25: {.1, .2} came true 1 of 2, {.6} never, {.9, 1.} 1.5 of 2."""
    actual = calibration([0.1, 0.2, 0.6, 0.9, 1.0], [1, 0, 0, 1, 0.5], bins=4)
    assert [(b.low, b.high, b.n) for b in actual.bins] == [(0.0, 0.25, 2), (0.5, 0.75, 1), (0.75, 1.0, 2)]
    assert [b.predicted for b in actual.bins] == pytest.approx([0.15, 0.6, 0.95])
    assert [b.observed.mean for b in actual.bins] == pytest.approx([0.5, 0.0, 0.75])
    assert actual.error == pytest.approx((2 * 0.35 + 0.6 + 2 * 0.2) / 5)
    assert actual.bins[0].observed == wilson_interval(1, 2)


def test_a_bin_begins_with_its_lower_edge():
    actual = calibration([0.0, 0.5, 1.0], [0, 1, 1], bins=2)
    assert [(b.low, b.n) for b in actual.bins] == [(0.0, 1), (0.5, 2)]


def test_only_the_right_model_is_calibrated():
    rng = np.random.default_rng(0)
    gaps = rng.normal(0, 2, 20000)
    first_wins = rng.random(20000) < 1 / (1 + np.exp(-gaps))
    chosen, rejected = np.where(first_wins, gaps, 0.0), np.where(first_wins, 0.0, gaps)
    assert preference_calibration(chosen, rejected).error < 0.015
    loud = preference_calibration(5 * chosen, 5 * rejected)
    assert loud.error > 0.1
    assert all(b.predicted > b.observed.high for b in loud.bins[1:])  # it claims more than it holds


def test_confidence_lies_between_a_half_and_one():
    actual = preference_calibration([0.0, 3.0, 0.0], [0.0, 0.0, 100.0], bins=5)
    assert actual.bins[0].low == 0.5 and actual.bins[-1].high == 1.0
    assert actual.bins[0].observed.mean == 0.5  # a tie is half right
    assert actual.bins[-1].n == 2 and actual.bins[-1].observed.mean == 0.5


def test_best_of_n_equals_the_mean_over_all_subsets():
    rewards = [1.0, 2.0, 4.0]
    assert expected_max(rewards, 2) == pytest.approx((2 + 4 + 4) / 3)
    values = np.random.default_rng(1).standard_normal(9)
    values[3] = values[5]
    for n in range(1, 10):
        subsets = [max(part) for part in itertools.combinations(values, n)]
        assert expected_max(values, n) == pytest.approx(np.mean(subsets), abs=1e-12)
    assert expected_max(np.arange(100_000.0), 1000) == pytest.approx(
        1000 * 100_001 / 1001 - 1
    )  # no factorials overflow


def test_divergence_of_the_best_of_n():
    for n, nats in ((1, 0.0), (2, 0.193147), (4, 0.636294), (16, 1.835089), (64, 3.174508)):
        assert best_of_n_kl_bound(n) == pytest.approx(nats, abs=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pairwise_accuracy([1.0], [1.0, 2.0]), "one reward each"),
        (lambda: pairwise_accuracy([], []), "one reward each"),
        (lambda: pairwise_accuracy([math.nan], [0.0]), "not finite"),
        (lambda: calibration([0.5], [0.5, 1.0]), "equally long"),
        (lambda: calibration([1.5], [1.0]), "predicted must lie"),
        (lambda: calibration([math.nan], [1.0]), "predicted must lie"),
        (lambda: calibration([0.5], [2.0]), "outcome in"),
        (lambda: calibration([0.5], [1.0], bins=0), "bins = 0"),
        (lambda: expected_max([1.0, 2.0], 3), "best of 3 from 2"),
        (lambda: expected_max([1.0, math.inf], 1), "not finite"),
        (lambda: expected_max([], 1), "best of 1 from 0"),
        (lambda: best_of_n_kl_bound(0), "n = 0"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()

"""Sentences about estimates, with and without an interval."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.statistics import Estimate, describe, describe_difference

SHARE = Estimate(0.61, 0.54, 0.676, 200)
SINGLE = Estimate(0.03, None, None, 1, reason="a single seed")


def test_a_sentence_names_the_interval_that_exists():
    assert describe("accuracy", SHARE) == "accuracy is 0.610 (95 % interval 0.540 to 0.676; 200 prompts)."
    assert describe("accuracy", SINGLE) == "accuracy is 0.030 (no interval: a single seed)."


def test_a_claim_needs_an_interval_beyond_zero():
    above, below = Estimate(0.2, 0.1, 0.3, 9), Estimate(-0.2, -0.3, -0.1, 9)
    assert describe_difference("ppo", "sft", "reward", above).startswith(
        "ppo scores higher than sft: reward differs by +0.2"
    )
    assert describe_difference("ppo", "sft", "reward", below).startswith("ppo scores lower than sft")
    open_ended = describe_difference("ppo", "sft", "reward", Estimate(0.1, -0.1, 0.3, 9), unit="seeds")
    assert open_ended.endswith("(95 % interval -0.100 to +0.300; 9 seeds); neither side is shown to score higher.")


def test_a_difference_without_interval_claims_nothing():
    sentence = describe_difference("ppo", "sft", "reward", SINGLE, unit="seeds")
    assert sentence == (
        "reward differs by +0.030 between ppo and sft (no interval: a single seed); "
        "these data cannot tell whether that is chance."
    )
    assert not SINGLE.above_zero and not SINGLE.below_zero and not SINGLE.has_interval


def test_json_is_strict():
    assert json.loads(json.dumps(dataclasses.asdict(SINGLE), allow_nan=False))["low"] is None


@pytest.mark.parametrize(
    ("low", "high", "reason"), [(0.1, None, ""), (None, None, ""), (0.1, 0.2, "why"), (math.nan, math.nan, "")]
)
def test_contradictions_are_refused(low: float | None, high: float | None, reason: str):
    with pytest.raises(InputError):
        Estimate(0.1, low, high, 2, reason=reason)

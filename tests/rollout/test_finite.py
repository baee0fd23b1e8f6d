"""NaN and infinite log-probabilities and scores stop a run."""

from __future__ import annotations

import numpy as np
import pytest

from rlhf_jax import rollout
from rlhf_jax.errors import InputError, RunStopped
from rlhf_jax.testing import completions, prompt_batch


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_log_probabilities_of_a_response_are_numbers(number):
    samples = completions(prompt_batch([[5], [6]]), [(7, 2), (7,)], length=3)
    logprobs = np.full((2, 3), -1.0, np.float32)
    logprobs[1, 2] = number  # after the end of a response: any value is allowed
    rollout.stop_if_not_finite(samples.replace(logprobs=logprobs), "run.model")
    logprobs[0, 1] = number
    with pytest.raises(
        RunStopped, match=rf"run.model: the model's numbers are not finite: log-probability {number} at"
    ):
        rollout.stop_if_not_finite(samples.replace(logprobs=logprobs), "run.model")


def test_scores_of_a_reward_model_are_numbers():
    rollout.stop_if_scores_not_finite(np.float32([0, 1]), "run.reward")
    with pytest.raises(RunStopped, match="run.reward: the model's numbers are not finite: score inf"):
        rollout.stop_if_scores_not_finite(np.float32([0, np.inf]), "run.reward")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("temperature", 1e-300, r"logits divided by it are infinite in float32; give 0 \(greedy\), or at least 1e-06"),
        ("temperature", 1e-20, "logits divided by it are infinite in float32"),
        ("temperature", 1e300, "float32, in which it is used, makes infinity of it"),
        ("top_p", 1e-300, "float32, in which it is used, makes 0 of it"),
        ("top_p", 1e-45, "float32, in which it is used, makes 0 of it"),  # kept by numpy, made 0 by the devices
        ("min_p", 1e-300, "float32, in which it is used, makes 0 of it"),
        ("repetition_penalty", 1e-300, "float32, in which it is used, makes 0 of it"),
        ("repetition_penalty", 1e300, "float32, in which it is used, makes infinity of it"),
        ("top_k", 2**31, "at most 2147483647, which int32 can hold"),
        ("max_new_tokens", 2**40, "at most 2147483647, which int32 can hold"),
    ],
)
def test_settings_are_numbers_in_the_precision_of_their_use(name, value, words):
    with pytest.raises(InputError, match=rf"^SamplingConfig.{name} = .*: .*{words}"):
        rollout.SamplingConfig(**{name: value})


def test_small_and_large_settings_that_float32_can_hold():
    rollout.SamplingConfig(temperature=1e-6, top_p=1e-30, min_p=0.0, repetition_penalty=1e30, top_k=2**31 - 1)
    with pytest.raises(InputError, match="SlotConfig.slots = 2147483648: .*int32"):
        rollout.SlotConfig(slots=2**31)

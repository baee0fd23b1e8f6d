"""Sampling of completions: prefill, decoding, continuous batching in slots."""

from rlhf_jax.rollout.finite import stop_if_not_finite, stop_if_scores_not_finite
from rlhf_jax.rollout.generate import generate
from rlhf_jax.rollout.settings import ALL_AT_ONCE, SamplingConfig, SlotConfig, check_shared_prompts

__all__ = [
    "ALL_AT_ONCE",
    "SamplingConfig",
    "SlotConfig",
    "check_shared_prompts",
    "generate",
    "stop_if_not_finite",
    "stop_if_scores_not_finite",
]

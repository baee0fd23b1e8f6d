"""Sampling completions and scoring them."""

from rlhf_jax.rollout.finite import stop_if_not_finite, stop_if_scores_not_finite
from rlhf_jax.rollout.generate import generate
from rlhf_jax.rollout.score import (
    RolloutModels,
    RolloutParams,
    as_token_batch,
    policy_and_values,
    policy_logprobs,
    score,
    sequence_logprobs,
    sequence_logprobs_and_router_loss,
    sequence_scores,
)
from rlhf_jax.rollout.settings import ALL_AT_ONCE, SamplingConfig, SlotConfig, refuse_unshared

__all__ = [
    "ALL_AT_ONCE",
    "RolloutModels",
    "RolloutParams",
    "SamplingConfig",
    "SlotConfig",
    "as_token_batch",
    "generate",
    "policy_and_values",
    "policy_logprobs",
    "refuse_unshared",
    "score",
    "sequence_logprobs",
    "sequence_logprobs_and_router_loss",
    "sequence_scores",
    "stop_if_not_finite",
    "stop_if_scores_not_finite",
]

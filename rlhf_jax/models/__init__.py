"""The decoder transformer: configuration, parameters as plain arrays, and pure functions of both."""

from rlhf_jax.models.cache import KVCache, Storage, empty_cache
from rlhf_jax.models.config import DTYPES, Head, ModelConfig
from rlhf_jax.models.decoder import SeparateLayer
from rlhf_jax.models.folding import Fold, Picked, fold_of
from rlhf_jax.models.layout import unconstrained
from rlhf_jax.models.lora import LoraConfig
from rlhf_jax.models.model import Model, parameter_count
from rlhf_jax.models.rope import RopeScaling
from rlhf_jax.models.sequences import (
    as_token_batch,
    policy_logprobs,
    sequence_logprobs,
    sequence_logprobs_and_router_loss,
    sequence_scores,
)

__all__ = [
    "DTYPES",
    "Fold",
    "Head",
    "KVCache",
    "LoraConfig",
    "Model",
    "ModelConfig",
    "Picked",
    "RopeScaling",
    "SeparateLayer",
    "Storage",
    "as_token_batch",
    "empty_cache",
    "fold_of",
    "parameter_count",
    "policy_logprobs",
    "sequence_logprobs",
    "sequence_logprobs_and_router_loss",
    "sequence_scores",
    "unconstrained",
]

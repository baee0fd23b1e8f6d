"""The decoder transformer: its configuration, its parameters as plain arrays, its pure functions."""

from rlhf_jax.models.cache import KVCache, Storage, empty_cache
from rlhf_jax.models.config import DTYPES, Head, ModelConfig
from rlhf_jax.models.decoder import SeparateLayer
from rlhf_jax.models.folding import Fold, Picked, fold_of
from rlhf_jax.models.layout import unconstrained
from rlhf_jax.models.lora import LoraConfig
from rlhf_jax.models.model import Model, parameter_count
from rlhf_jax.models.rope import RopeScaling

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
    "empty_cache",
    "fold_of",
    "parameter_count",
    "unconstrained",
]

"""The key/value cache of decoding."""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int32

from rlhf_jax.models.config import ModelConfig


@struct.dataclass
class KVCache:
    """Keys and values of what was read so far.

    keys, values: compute_dtype [L, B, G, C, K]: per row and head a contiguous [C, K] matrix, which is what the decode
    matmul reads. valid: bool [B, C], True where a real token was written. index: int32 [], the next column to write
    (one for all rows: prompts are left-padded).
    """

    keys: Float[Array, "L B G C K"]
    values: Float[Array, "L B G C K"]
    valid: Bool[Array, "B C"]
    index: Int32[Array, ""]

    LOGICAL_AXES = ("layers", "act_batch", "act_kv_heads", "act_length", "act_head_dim")


def empty_cache(config: ModelConfig, batch: int, capacity: int) -> KVCache:
    """A cache of ``capacity`` columns that holds nothing."""
    shape = (config.num_layers, batch, config.num_kv_heads, capacity, config.head_dim)
    return KVCache(
        keys=jnp.zeros(shape, config.dtype),
        values=jnp.zeros(shape, config.dtype),
        valid=jnp.zeros((batch, capacity), bool),
        index=jnp.zeros((), jnp.int32),
    )

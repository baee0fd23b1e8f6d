"""The key/value cache of decoding."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Int32

from rlhf_jax.models.config import ModelConfig


@struct.dataclass
class KVCache:
    """Keys and values of what was read so far.

    keys, values: compute_dtype [L, B, G, C, K]: per row and head a contiguous [C, K] matrix, which is what the decode
    matmul reads; or, `separated`, a tuple of L arrays [B, G, C, K]. positions: int32 [B, C], the position of the token in
    a column, -1 where there is none; keys carry their rotation, so columns may hold tokens in any order. index: int32 [],
    the next column to write, one for all rows (one slice instead of a scatter): a sampler that puts a new prompt into a
    row writes on where the others are.
    """

    keys: Any
    values: Any
    positions: Int32[Array, "B C"]
    index: Int32[Array, ""]

    LOGICAL_AXES = ("layers", "act_batch", "act_kv_heads", "act_length", "act_head_dim")

    @property
    def valid(self) -> Bool[Array, "B C"]:
        """True where a column holds a token."""
        return self.positions >= 0

    def take(self, rows: Int32[Array, "N"], capacity: int | None = None) -> KVCache:  # noqa: F821
        """The given rows (one may come several times), with empty columns behind up to ``capacity`` (None: as many)."""
        more = 0 if capacity is None else capacity - self.positions.shape[1]

        def widened(stack: Array) -> Array:
            chosen = jnp.take(stack, rows, axis=stack.ndim - 4)
            return jnp.pad(chosen, [*[(0, 0)] * (stack.ndim - 2), (0, more), (0, 0)])

        positions = jnp.pad(jnp.take(self.positions, rows, axis=0), ((0, 0), (0, more)), constant_values=-1)
        keys, values = jax.tree.map(widened, (self.keys, self.values))
        return KVCache(keys, values, positions, self.index)

    def separated(self) -> KVCache:
        """With an array for each layer."""
        return dataclasses.replace(self, keys=tuple(self.keys), values=tuple(self.values))

    def put(self, row: Int32[Array, ""], other: KVCache, other_row: Int32[Array, ""]) -> KVCache:
        """With what ``row`` held replaced, in place, by a row of ``other``, whose columns become the first ones."""
        zero = jnp.zeros((), jnp.int32)

        def moved(stack: Array, source: Array) -> Array:
            one = jax.lax.dynamic_slice_in_dim(source, other_row, 1, axis=stack.ndim - 4)
            return jax.lax.dynamic_update_slice(stack, one, (*[zero] * (stack.ndim - 4), row, zero, zero, zero))

        one = jax.lax.dynamic_slice_in_dim(other.positions, other_row, 1, axis=0)
        one = jnp.pad(one, ((0, 0), (0, self.positions.shape[1] - one.shape[1])), constant_values=-1)
        positions = jax.lax.dynamic_update_slice(self.positions, one, (row, zero))
        keys, values = jax.tree.map(moved, (self.keys, self.values), (other.keys, other.values))
        return KVCache(keys, values, positions, self.index)


def empty_cache(config: ModelConfig, batch: int, capacity: int) -> KVCache:
    """A cache of ``capacity`` columns that holds nothing."""
    shape = (config.num_layers, batch, config.num_kv_heads, capacity, config.head_dim)
    return KVCache(
        keys=jnp.zeros(shape, config.dtype),
        values=jnp.zeros(shape, config.dtype),
        positions=jnp.full((batch, capacity), -1, jnp.int32),
        index=jnp.zeros((), jnp.int32),
    )

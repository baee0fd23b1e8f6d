"""The key/value cache of decoding."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Int32

from rlhf_jax.models.config import ModelConfig

Storage = Literal["compute", "bfloat16", "int8"]
"""The format in which keys and values are stored: compute_dtype, bfloat16, or `Quantised`."""


@struct.dataclass
class Quantised:
    """Vectors as int8 numbers times one scale per vector.

    numbers: int8 [..., K]. scale: float32 [..., 1], the largest magnitude of the vector over 127: the dequantized
    values are off by at most half a scale.
    """

    numbers: Any
    scale: Any


def to_storage(x: Array, storage: Storage) -> Any:
    """Return keys or values [..., K] in the storage format; vectors of zeros stay zeros."""
    if storage == "bfloat16":
        return x.astype(jnp.bfloat16)
    if storage == "compute":
        return x
    x32 = x.astype(jnp.float32)
    scale = jnp.abs(x32).max(axis=-1, keepdims=True) / 127.0
    numbers = jnp.round(x32 / jnp.where(scale > 0, scale, 1.0)).astype(jnp.int8)
    return Quantised(numbers, scale)


def from_storage(values: Any, dtype: Any) -> Array:
    """Return stored keys or values in ``dtype``: the inverse of `to_storage`, up to its rounding."""
    if isinstance(values, Quantised):
        numbers: Array = values.numbers.astype(jnp.float32) * values.scale
        return numbers.astype(dtype)
    whole: Array = values
    return whole.astype(dtype)


@struct.dataclass
class KVCache:
    """Keys and values of the tokens read so far.

    keys, values: compute_dtype [L, B, G, C, K]: per row and head a contiguous [C, K] matrix, which is what the decode
    matmul reads; in the format of ``storage`` (`Quantised` has two such arrays); or, after `separate_layers`, a tuple of L
    arrays [B, G, C, K].
    positions: int32 [B, C], the position of the token in a column, -1 for an empty column. Keys are already rotated, so
    columns may hold tokens in any order.
    index: int32 [], the next column to write, the same for all rows (a slice instead of a scatter): the sampler
    continues a new prompt at the column where the running rows are.
    recent: a separate cache of the sliding-window layers, a ring of as many columns as their window; None: those layers
    are in this cache.
    """

    keys: Any
    values: Any
    positions: Int32[Array, "B C"]
    index: Int32[Array, ""]
    recent: KVCache | None = None
    storage: Storage = struct.field(pytree_node=False, default="compute")

    LOGICAL_AXES = ("layers", "act_batch", "act_kv_heads", "act_cache", "act_head_dim")

    @property
    def valid(self) -> Bool[Array, "B C"]:
        """True where a column holds a token."""
        return self.positions >= 0

    def take(self, rows: Int32[Array, "N"], capacity: int | None = None) -> KVCache:  # noqa: F821
        """Return the cache of these rows; a row may occur several times.

        capacity: pad with empty columns to so many, None: no padding.
        """
        chosen = jax.tree.map(lambda stack: jnp.take(stack, rows, axis=stack.ndim - 4), (self.keys, self.values))
        positions = jnp.take(self.positions, rows, axis=0)
        recent = None if self.recent is None else self.recent.take(rows)
        cache = dataclasses.replace(self, keys=chosen[0], values=chosen[1], positions=positions, recent=recent)
        return cache if capacity is None else cache.pad_columns(capacity)

    def pad_columns(self, capacity: int) -> KVCache:
        """Return the cache with empty columns appended until it has ``capacity`` columns; ``recent`` is not padded."""
        more = capacity - self.positions.shape[1]

        def padded(stack: Array) -> Array:
            return jnp.pad(stack, [*[(0, 0)] * (stack.ndim - 2), (0, more), (0, 0)])

        keys, values = jax.tree.map(padded, (self.keys, self.values))
        positions = jnp.pad(self.positions, ((0, 0), (0, more)), constant_values=-1)
        return dataclasses.replace(self, keys=keys, values=values, positions=positions)

    def separate_layers(self) -> KVCache:
        """Return the cache with one array per layer instead of stacks."""

        def layer(stack: Any, index: int) -> Any:
            return jax.tree.map(lambda x: x[index], stack)

        def apart(stack: Any) -> tuple[Any, ...]:
            return tuple(layer(stack, index) for index in range(jax.tree.leaves(stack)[0].shape[0]))

        recent = None if self.recent is None else self.recent.separate_layers()
        return dataclasses.replace(self, keys=apart(self.keys), values=apart(self.values), recent=recent)

    def put(
        self, row: Int32[Array, ""], other: KVCache, other_row: Int32[Array, ""], turn: Int32[Array, ""] | None = None
    ) -> KVCache:
        """Return the cache with ``row`` replaced, in place, by a row of ``other``, whose columns become the first ones.

        turn: roll those columns around the ring by so many.
        """
        zero = jnp.zeros((), jnp.int32)

        def replace_row(stack: Array, source: Array) -> Array:
            columns = jax.lax.dynamic_slice_in_dim(source, other_row, 1, axis=stack.ndim - 4)
            columns = columns if turn is None else jnp.roll(columns, turn, axis=-2)
            return jax.lax.dynamic_update_slice(stack, columns, (*[zero] * (stack.ndim - 4), row, zero, zero, zero))

        columns = jax.lax.dynamic_slice_in_dim(other.positions, other_row, 1, axis=0)
        columns = jnp.pad(columns, ((0, 0), (0, self.positions.shape[1] - columns.shape[1])), constant_values=-1)
        columns = columns if turn is None else jnp.roll(columns, turn, axis=-1)
        positions = jax.lax.dynamic_update_slice(self.positions, columns, (row, zero))
        keys, values = jax.tree.map(replace_row, (self.keys, self.values), (other.keys, other.values))
        recent = self.recent
        if recent is not None and other.recent is not None:  # the next column of both is the same then
            recent = recent.put(row, other.recent, other_row, recent.index - other.recent.index)
        return dataclasses.replace(self, keys=keys, values=values, positions=positions, recent=recent)

    def split_sliding(self, slides: Sequence[bool], window: int) -> KVCache:
        """Return the cache with the sliding-window layers in a ring of ``window`` columns (`recent`).

        The ring holds the last tokens by position, because the columns of a shared prefix come first. slides: for every
        layer, whether it has a sliding window.
        """
        numbers = [
            [index for index, other in enumerate(slides) if other == sliding_layers] for sliding_layers in (False, True)
        ]
        whole, sliding = (
            jax.tree.map(lambda stack, chosen=chosen: stack[jnp.asarray(chosen, jnp.int32)], (self.keys, self.values))
            for chosen in numbers
        )
        order = jnp.argsort(self.positions, axis=1, stable=True)[:, -window:]
        at = order[None, :, None, :, None]
        keys, values = jax.tree.map(lambda stack: jnp.take_along_axis(stack, at, axis=-2), sliding)
        recent = ring_of(keys, values, jnp.take_along_axis(self.positions, order, axis=1), window, self.storage)
        return dataclasses.replace(self, keys=whole[0], values=whole[1], recent=recent)

    @property
    def parts(self) -> tuple[KVCache, ...]:
        """Itself, and ``recent`` when there is one."""
        return (self,) if self.recent is None else (self, self.recent)

    def advance(self, columns: int, parts: Sequence[tuple[Any, Any, Array]]) -> KVCache:
        """Return the cache after reading ``columns`` more columns.

        parts: for each of `parts` its new keys, values and positions.
        """
        (keys, values, positions), *recent_parts = parts
        recent = self.recent
        if recent is not None:
            recent = dataclasses.replace(
                recent.advance(columns, recent_parts), index=(recent.index + columns) % recent.capacity
            )
        index = self.index + columns
        return dataclasses.replace(self, keys=keys, values=values, positions=positions, index=index, recent=recent)

    @property
    def capacity(self) -> int:
        """C."""
        return int(self.positions.shape[1])


def ring_of(keys: Any, values: Any, positions: Int32[Array, "B C"], window: int, storage: Storage) -> KVCache:
    """Return a ring of ``window`` columns that holds the last ``window`` columns; new columns are written around the ring.

    keys, values: may have fewer columns than ``positions``: the last ones.
    """
    columns = min(window, positions.shape[1])
    keys, values = jax.tree.map(lambda stack: stack[..., stack.shape[-2] - columns :, :], (keys, values))
    index = jnp.asarray(columns % window, jnp.int32)
    return KVCache(keys, values, positions[:, -columns:], index, storage=storage).pad_columns(window)


def empty_cache(config: ModelConfig, batch: int, capacity: int, storage: Storage = "compute") -> KVCache:
    """Return an empty cache of ``capacity`` columns."""
    shape = (config.num_layers, batch, config.num_kv_heads, capacity, config.head_dim)
    return KVCache(
        keys=to_storage(jnp.zeros(shape, config.dtype), storage),
        values=to_storage(jnp.zeros(shape, config.dtype), storage),
        positions=jnp.full((batch, capacity), -1, jnp.int32),
        index=jnp.zeros((), jnp.int32),
        storage=storage,
    )

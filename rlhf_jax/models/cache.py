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
"""How keys and values are kept: in compute_dtype, in bfloat16, or `Quantised`."""


@struct.dataclass
class Quantised:
    """Numbers as int8 times a scale for each vector. numbers: int8 [..., K]. scale: float32 [..., 1], the largest
    magnitude of the vector over 127: what comes back is off by at most half a scale."""

    numbers: Any
    scale: Any


def stored(x: Array, storage: Storage) -> Any:
    """Keys or values [..., K] as they are kept; vectors of zeros stay so."""
    if storage == "bfloat16":
        return x.astype(jnp.bfloat16)
    if storage == "compute":
        return x
    x32 = x.astype(jnp.float32)
    scale = jnp.abs(x32).max(axis=-1, keepdims=True) / 127.0
    numbers = jnp.round(x32 / jnp.where(scale > 0, scale, 1.0)).astype(jnp.int8)
    return Quantised(numbers, scale)


def restored(kept: Any, dtype: Any) -> Array:
    """As they are multiplied: the inverse of `stored`, up to its rounding."""
    if isinstance(kept, Quantised):
        numbers: Array = kept.numbers.astype(jnp.float32) * kept.scale
        return numbers.astype(dtype)
    whole: Array = kept
    return whole.astype(dtype)


@struct.dataclass
class KVCache:
    """Keys and values of what was read so far.

    keys, values: compute_dtype [L, B, G, C, K]: per row and head a contiguous [C, K] matrix, which is what the decode
    matmul reads; kept as ``storage`` says (`Quantised` has two such arrays); or, `separated`, a tuple of L [B, G, C, K].
    positions: int32 [B, C], the position of the token in a column, -1 where there is none; keys carry their rotation, so
    columns may hold tokens in any order. index: int32 [], the next column to write, one for all rows (one slice instead of
    a scatter): a sampler that puts a new prompt into a row writes on where the others are. recent: the layers that slide
    in a cache of their own, a ring of as many columns as their window; None: they are among the others.
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
        """The given rows (one may come several times), with empty columns behind up to ``capacity`` (None: as many)."""
        chosen = jax.tree.map(lambda stack: jnp.take(stack, rows, axis=stack.ndim - 4), (self.keys, self.values))
        positions = jnp.take(self.positions, rows, axis=0)
        recent = None if self.recent is None else self.recent.take(rows)
        taken = dataclasses.replace(self, keys=chosen[0], values=chosen[1], positions=positions, recent=recent)
        return taken if capacity is None else taken.widened(capacity)

    def widened(self, capacity: int) -> KVCache:
        """With empty columns behind, ``capacity`` in all; ``recent`` keeps its own."""
        more = capacity - self.positions.shape[1]

        def padded(stack: Array) -> Array:
            return jnp.pad(stack, [*[(0, 0)] * (stack.ndim - 2), (0, more), (0, 0)])

        keys, values = jax.tree.map(padded, (self.keys, self.values))
        positions = jnp.pad(self.positions, ((0, 0), (0, more)), constant_values=-1)
        return dataclasses.replace(self, keys=keys, values=values, positions=positions)

    def separated(self) -> KVCache:
        """With an array for each layer."""

        def layer(stack: Any, index: int) -> Any:
            return jax.tree.map(lambda x: x[index], stack)

        def apart(stack: Any) -> tuple[Any, ...]:
            return tuple(layer(stack, index) for index in range(jax.tree.leaves(stack)[0].shape[0]))

        recent = None if self.recent is None else self.recent.separated()
        return dataclasses.replace(self, keys=apart(self.keys), values=apart(self.values), recent=recent)

    def put(
        self, row: Int32[Array, ""], other: KVCache, other_row: Int32[Array, ""], turn: Int32[Array, ""] | None = None
    ) -> KVCache:
        """With what ``row`` held replaced, in place, by a row of ``other``, whose columns become the first ones, or with
        ``turn`` those from there on around the ring."""
        zero = jnp.zeros((), jnp.int32)

        def moved(stack: Array, source: Array) -> Array:
            one = jax.lax.dynamic_slice_in_dim(source, other_row, 1, axis=stack.ndim - 4)
            one = one if turn is None else jnp.roll(one, turn, axis=-2)
            return jax.lax.dynamic_update_slice(stack, one, (*[zero] * (stack.ndim - 4), row, zero, zero, zero))

        one = jax.lax.dynamic_slice_in_dim(other.positions, other_row, 1, axis=0)
        one = jnp.pad(one, ((0, 0), (0, self.positions.shape[1] - one.shape[1])), constant_values=-1)
        one = one if turn is None else jnp.roll(one, turn, axis=-1)
        positions = jax.lax.dynamic_update_slice(self.positions, one, (row, zero))
        keys, values = jax.tree.map(moved, (self.keys, self.values), (other.keys, other.values))
        recent = self.recent
        if recent is not None and other.recent is not None:  # the next column of both is the same then
            recent = recent.put(row, other.recent, other_row, recent.index - other.recent.index)
        return dataclasses.replace(self, keys=keys, values=values, positions=positions, recent=recent)

    def parted(self, slides: Sequence[bool], window: int) -> KVCache:
        """With the layers that slide in a ring of ``window`` columns (`recent`): the last tokens by their positions, as columns
        of a prefix come first. slides: of every layer."""
        numbers = [[index for index, other in enumerate(slides) if other == which] for which in (False, True)]
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

    def after(self, columns: int, parts: Sequence[tuple[Any, Any, Array]]) -> KVCache:
        """With ``columns`` more columns read: for each of `parts` its keys, values and positions now."""
        (keys, values, positions), *rest = parts
        recent = self.recent
        if recent is not None:
            recent = dataclasses.replace(recent.after(columns, rest), index=(recent.index + columns) % recent.capacity)
        index = self.index + columns
        return dataclasses.replace(self, keys=keys, values=values, positions=positions, index=index, recent=recent)

    @property
    def capacity(self) -> int:
        """C."""
        return int(self.positions.shape[1])


def ring_of(keys: Any, values: Any, positions: Int32[Array, "B C"], window: int, storage: Storage) -> KVCache:
    """The last ``window`` of some columns (keys and values may hold these alone), which new ones will follow around a ring of
    so many."""
    held = min(window, positions.shape[1])
    keys, values = jax.tree.map(lambda stack: stack[..., stack.shape[-2] - held :, :], (keys, values))
    index = jnp.asarray(held % window, jnp.int32)
    return KVCache(keys, values, positions[:, -held:], index, storage=storage).widened(window)


def empty_cache(config: ModelConfig, batch: int, capacity: int, storage: Storage = "compute") -> KVCache:
    """A cache of ``capacity`` columns that holds nothing."""
    shape = (config.num_layers, batch, config.num_kv_heads, capacity, config.head_dim)
    return KVCache(
        keys=stored(jnp.zeros(shape, config.dtype), storage),
        values=stored(jnp.zeros(shape, config.dtype), storage),
        positions=jnp.full((batch, capacity), -1, jnp.int32),
        index=jnp.zeros((), jnp.int32),
        storage=storage,
    )

"""Embedding lookup with a vocab-sharded table, as a shard_map island.

Without it, XLA makes float32 rows of every token of all devices on each of them, twice, and in a large ring sums the
float32 gradients of whole tables on every device and keeps those that wait.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int32

from rlhf_jax.models.layout import Constrain, axis_names, local_part, reduce_scatter


def look_up(
    table: Float[Array, "V D"], tokens: Int32[Array, "B S"], dtype: Any, constrain: Constrain
) -> Float[Array, "B S D"]:
    """Return ``jnp.take(table, tokens, axis=0)`` in ``dtype``; NaN for ids outside the table. The gradient is summed in float32."""
    mesh = constrain.mesh
    words = constrain.spec(("vocab", "embed_table"), table.shape)[0] if mesh is not None else None
    holders = axis_names(words)
    if mesh is None or all(mesh.shape[axis] == 1 for axis in holders):
        return jnp.take(table, tokens, axis=0).astype(dtype)
    batch, columns = constrain.spec(("act_batch", "act_length"), tokens.shape)
    island = Island(
        mesh, holders, axis_names(batch), axis_names(columns), table.shape[0], table.dtype, jnp.dtype(dtype)
    )
    table_spec, token_spec = PartitionSpec(words, None), PartitionSpec(batch, columns)
    rows = PartitionSpec(batch, columns, None)
    # Sums are written out, so that nothing is left for JAX to check or to transpose.
    forward = jax.shard_map(island.rows, mesh=mesh, in_specs=(table_spec, token_spec), out_specs=rows, check_vma=False)
    backward = jax.shard_map(
        island.gradient, mesh=mesh, in_specs=(token_spec, rows), out_specs=table_spec, check_vma=False
    )

    @jax.custom_vjp
    def lookup(table: Array, tokens: Array) -> Array:
        out: Array = forward(table, tokens)
        return out

    lookup.defvjp(
        lambda table, tokens: (forward(table, tokens), tokens),
        lambda tokens, rows: (backward(tokens, rows), None),
    )
    out: Array = lookup(table, tokens)
    return out


@dataclasses.dataclass(frozen=True)
class Island:
    """The computation of each device.

    holders: mesh axes that split the table's vocabulary; batch, columns: mesh axes that split the tokens. words,
    table_dtype: rows and dtype of the whole table; dtype: of the result.

    Either every device looks up all tokens along the axes that split both in its own part of the table, and the results
    are summed and scattered; or the table is gathered in the dtype of the result. The cheaper transfer is used.
    """

    mesh: Mesh
    holders: tuple[str, ...]
    batch: tuple[str, ...]
    columns: tuple[str, ...]
    words: int
    table_dtype: Any
    dtype: Any

    @property
    def shared(self) -> tuple[str, ...]:
        """Mesh axes that split both the vocabulary and the batch."""
        return tuple(axis for axis in self.holders if axis in self.batch)

    def rows(self, table: Array, tokens: Array) -> Array:
        """Return the rows of a device's tokens [b, s, D]."""
        table = table.astype(self.dtype)
        if self.table_travels(tokens):
            for axis in reversed(self.holders):
                table = jax.lax.all_gather(table, axis, tiled=True)
            return jnp.take(table, tokens, axis=0)
        places, is_local = self._local_places(tokens, table.shape[0])
        out = jnp.where(is_local[..., None], jnp.take(table, places, axis=0, mode="clip"), 0)
        if sums := tuple(axis for axis in self.holders if axis not in self.shared):
            out = jax.lax.psum(out, sums)
        for axis in self.shared:
            out = reduce_scatter(out, axis, self.mesh)
        valid = (tokens >= -self.words) & (tokens < self.words)
        return jnp.where(valid[..., None], out, jnp.nan)

    def gradient(self, tokens: Array, rows: Array) -> Array:
        """Return the gradient of a device's part of the table [v, D]. rows: gradient of its rows."""
        size, parts = self.words, 1
        if not self.table_travels(tokens):
            size, parts = size // self.parts(self.holders), self.parts(self.shared)
            local_tokens, is_local = self._local_places(tokens, size)
            tokens = jnp.where(is_local, local_tokens, size)  # ids of other devices: past the last row, dropped
            rows = self._gather(rows)

        def added(whole: Array, part: tuple[Array, Array]) -> tuple[Array, None]:
            places, rows = part
            return whole.at[places].add(rows.astype(jnp.float32), mode="drop"), None

        # One device's rows at a time, so that not all of them become float32 at once.
        split = (tokens.reshape(parts, -1), rows.reshape(parts, -1, rows.shape[-1]))
        whole, _ = jax.lax.scan(added, jnp.zeros((size, rows.shape[-1]), jnp.float32), split)
        if size == self.words:
            for axis in self.holders:
                whole = (
                    reduce_scatter(whole, axis, self.mesh)
                    if axis in self.shared
                    else local_part(whole, axis, self.mesh)
                )
        if sums := tuple(axis for axis in (*self.batch, *self.columns) if axis not in self.shared):
            whole = jax.lax.psum(whole, sums)
        return whole.astype(self.table_dtype)

    def table_travels(self, tokens: Array) -> bool:
        """Return whether the table is gathered rather than the rows exchanged. tokens: [b, s] of a device."""
        return tokens.size * self.parts(self.shared) > self.words

    def parts(self, axes: tuple[str, ...]) -> int:
        """Return the number of devices that these axes split over."""
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def _gather(self, x: Array) -> Array:
        for axis in reversed(self.shared):
            x = jax.lax.all_gather(x, axis, tiled=True)
        return x

    def _local_places(self, tokens: Array, size: int) -> tuple[Array, Array]:
        """Return (places, is_local) of all tokens along the shared axes.

        places: index among the ``size`` rows of the table that this device holds; is_local: whether the token is among
        them.
        """
        tokens = self._gather(tokens)
        tokens = jnp.where(tokens < 0, tokens + self.words, tokens)  # counted from the end
        places = tokens - jax.lax.axis_index(self.holders) * size
        return places, (places >= 0) & (places < size)

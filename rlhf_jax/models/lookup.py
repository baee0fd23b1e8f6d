"""Rows of a token table whose words are split over a mesh, as a shard_map island.

Left to itself, XLA makes float32 rows of every token of all devices on each of them, twice, and in a large ring sums the
float32 gradients of whole tables on every device, and keeps those that wait.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int32

from rlhf_jax.models.layout import Constrain, axis_names, own_part, scattered_sum


def look_up(
    table: Float[Array, "V D"], tokens: Int32[Array, "B S"], dtype: Any, constrain: Constrain
) -> Float[Array, "B S D"]:
    """``jnp.take(table, tokens, axis=0)`` in ``dtype``, NaN for what is no word; the table's gradient is summed in float32."""
    mesh = constrain.mesh
    words = constrain.spec(("vocab", "embed_table"), table.shape)[0] if mesh is not None else None
    holders = axis_names(words)
    if mesh is None or all(mesh.shape[axis] == 1 for axis in holders):
        return jnp.take(table, tokens, axis=0).astype(dtype)
    batch, columns = constrain.spec(("act_batch", "act_length"), tokens.shape)
    island = Island(
        mesh, holders, axis_names(batch), axis_names(columns), table.shape[0], table.dtype, jnp.dtype(dtype)
    )
    held, placed = PartitionSpec(words, None), PartitionSpec(batch, columns)
    rows = PartitionSpec(batch, columns, None)
    # Sums are written out, so that nothing is left for JAX to check or to transpose.
    forward = jax.shard_map(island.rows, mesh=mesh, in_specs=(held, placed), out_specs=rows, check_vma=False)
    backward = jax.shard_map(island.gradient, mesh=mesh, in_specs=(placed, rows), out_specs=held, check_vma=False)

    @jax.custom_vjp
    def looked_up(table: Array, tokens: Array) -> Array:
        out: Array = forward(table, tokens)
        return out

    looked_up.defvjp(
        lambda table, tokens: (forward(table, tokens), tokens),
        lambda tokens, rows: (backward(tokens, rows), None),
    )
    out: Array = looked_up(table, tokens)
    return out


@dataclasses.dataclass(frozen=True)
class Island:
    """What each device does. holders: mesh axes that split the table's words; batch, columns: those that split tokens. words,
    kept: of the whole table, and the dtype that it has; dtype: of rows.

    Either every device makes rows of all tokens along the axes that split both, from the words that it holds, and the rows
    are added up and scattered; or the table comes whole in the dtype of rows. The less travels.
    """

    mesh: Mesh
    holders: tuple[str, ...]
    batch: tuple[str, ...]
    columns: tuple[str, ...]
    words: int
    kept: Any
    dtype: Any

    @property
    def shared(self) -> tuple[str, ...]:
        """Axes along which devices with other tokens hold other words."""
        return tuple(axis for axis in self.holders if axis in self.batch)

    def rows(self, table: Array, tokens: Array) -> Array:
        """Of a device's tokens [b, s, D]."""
        table = table.astype(self.dtype)
        if self.table_travels(tokens):
            for axis in reversed(self.holders):
                table = jax.lax.all_gather(table, axis, tiled=True)
            return jnp.take(table, tokens, axis=0)
        here, ours = self._mine(tokens, table.shape[0])
        out = jnp.where(ours[..., None], jnp.take(table, here, axis=0, mode="clip"), 0)
        if sums := tuple(axis for axis in self.holders if axis not in self.shared):
            out = jax.lax.psum(out, sums)
        for axis in self.shared:
            out = scattered_sum(out, axis, self.mesh)
        known = (tokens >= -self.words) & (tokens < self.words)
        return jnp.where(known[..., None], out, jnp.nan)

    def gradient(self, tokens: Array, rows: Array) -> Array:
        """Of a device's words [v, D]. rows: gradient of its rows."""
        size, parts = self.words, 1
        if not self.table_travels(tokens):
            size, parts = size // self.parts(self.holders), self.parts(self.shared)
            here, ours = self._mine(tokens, size)
            tokens = jnp.where(ours, here, size)  # of other devices: behind the last word, dropped
            rows = self._gathered(rows)

        def added(whole: Array, part: tuple[Array, Array]) -> tuple[Array, None]:
            places, rows = part
            return whole.at[places].add(rows.astype(jnp.float32), mode="drop"), None

        # One device's rows at a time, so that not all of them become float32 at once.
        split = (tokens.reshape(parts, -1), rows.reshape(parts, -1, rows.shape[-1]))
        whole, _ = jax.lax.scan(added, jnp.zeros((size, rows.shape[-1]), jnp.float32), split)
        if size == self.words:
            for axis in self.holders:
                whole = (
                    scattered_sum(whole, axis, self.mesh) if axis in self.shared else own_part(whole, axis, self.mesh)
                )
        if sums := tuple(axis for axis in (*self.batch, *self.columns) if axis not in self.shared):
            whole = jax.lax.psum(whole, sums)
        return whole.astype(self.kept)

    def table_travels(self, tokens: Array) -> bool:
        """Rather than rows. tokens: [b, s] of a device."""
        return tokens.size * self.parts(self.shared) > self.words

    def parts(self, axes: tuple[str, ...]) -> int:
        """Over how many devices these axes split."""
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def _gathered(self, x: Array) -> Array:
        for axis in reversed(self.shared):
            x = jax.lax.all_gather(x, axis, tiled=True)
        return x

    def _mine(self, tokens: Array, size: int) -> tuple[Array, Array]:
        """All tokens along the shared axes: their places among the ``size`` words that this device holds, and whether they
        are among them."""
        tokens = self._gathered(tokens)
        tokens = jnp.where(tokens < 0, tokens + self.words, tokens)  # counted from the end
        here = tokens - jax.lax.axis_index(self.holders) * size
        return here, (here >= 0) & (here < size)

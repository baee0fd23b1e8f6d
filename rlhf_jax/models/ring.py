"""Ring attention (Liu et al. 2023) as a shard_map island: long rows whose columns are split over the mesh.

Each device keeps the queries of its columns. Keys, values and segment ids are passed around the devices along the
sequence axis, one block per hop, and the softmax is combined block by block (running maximum and sums, Milakov and
Gimelshein 2018). No device ever holds the scores of more than [own columns, own columns], nor the keys of more than two
blocks. Blocks of the future are computed and masked. With a sliding window the ring ends at the last block inside the
window.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int32

from rlhf_jax.models.weights import soft_cap

MASKED = -1e30
"""The score of a masked key, as in `attention.attend`: finite, so that a row without keys (padding) gives no NaN."""

Sums = tuple[Array, Array, Array]
"""Running sums of each query, float32: the largest score and the sum of exp(score - largest), [B, G, R, S, 1] each, and the
sum of those weights times the values [B, G, R, S, K]."""


def ring_attention(
    query: Float[Array, "B S G R K"],
    key: Float[Array, "B G S K"],
    value: Float[Array, "B G S K"],
    segment_ids: Int32[Array, "B S"],
    *,
    window: int | None,
    scale: float,
    cap: float | None,
    precision: jax.lax.Precision | None,
    mesh: Mesh,
    key_spec: PartitionSpec,
) -> Float[Array, "B S G R K"]:
    """Compute causal attention inside segments, like `attention.attend` under `attention.segment_mask`.

    The results of padding columns (segment 0) may differ. key_spec: PartitionSpec of keys [B, G, S, K]; its third entry
    is the one mesh axis that splits the columns.
    """
    batch, heads, columns, size = key_spec
    (axis,) = (columns,) if isinstance(columns, str) else columns
    parts = mesh.shape[axis]
    length = query.shape[1] // parts
    reach = parts if window is None else min(parts, 1 + -(-(window - 1) // length))
    local = functools.partial(
        _attend_locally, axis=axis, parts=parts, hops=reach, window=window, scale=scale, cap=cap, precision=precision
    )
    query_spec = PartitionSpec(batch, columns, heads, None, size)
    island = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(query_spec, key_spec, key_spec, PartitionSpec(batch, columns)),
        out_specs=query_spec,
    )
    mixed: Array = island(query, key, value, segment_ids)
    return mixed


def _attend_locally(
    query: Array,
    key: Array,
    value: Array,
    segment_ids: Array,
    *,
    axis: str,
    parts: int,
    hops: int,
    window: int | None,
    scale: float,
    cap: float | None,
    precision: jax.lax.Precision | None,
) -> Array:
    """Return attention of the device's own columns: to its own block of keys first, then to those of the devices before it."""
    own_index, length = jax.lax.axis_index(axis), query.shape[1]
    turn = [(device, (device + 1) % parts) for device in range(parts)]
    rows = query.transpose(0, 2, 3, 1, 4)  # [B, G, R, S, K]

    def block(owner: Array, key: Array, value: Array, segments: Array) -> Sums:
        mask = visible(segment_ids, segments, own_index * length, owner * length, window)
        scores = jnp.einsum("bgrqk,bgck->bgrqc", rows, key, precision=precision, preferred_element_type=jnp.float32)
        scores = jnp.where(mask[:, None, None], soft_cap(scores * scale, cap), MASKED)
        largest = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
        weights = jnp.exp(scores - largest)
        mixed = jnp.einsum(
            "bgrqc,bgck->bgrqk",
            weights.astype(value.dtype),
            value,
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        return largest, weights.sum(axis=-1, keepdims=True), mixed

    @jax.checkpoint
    def hop(carried: tuple[Sums, Array, Array, Array], number: Array) -> tuple[tuple[Sums, Array, Array, Array], None]:
        sums, *travelling = carried
        key, value, segments = (jax.lax.ppermute(array, axis, turn) for array in travelling)
        return (merge_sums(sums, block((own_index - number) % parts, key, value, segments)), key, value, segments), None

    start = (block(own_index, key, value, segment_ids), key, value, segment_ids)
    ((_, total, mixed), *_), _ = jax.lax.scan(hop, start, jnp.arange(1, hops, dtype=jnp.int32))
    return (mixed / total).astype(value.dtype).transpose(0, 3, 1, 2, 4)


def visible(
    segments: Int32[Array, "B S"],
    other_segments: Int32[Array, "B C"],
    first: Array,
    first_other: Array,
    window: int | None,
) -> Bool[Array, "B S C"]:
    """Return `attention.segment_mask` between two blocks of columns that begin at ``first`` and ``first_other``."""
    at = first + jnp.arange(segments.shape[1], dtype=jnp.int32)[:, None]
    other = first_other + jnp.arange(other_segments.shape[1], dtype=jnp.int32)[None]
    in_reach = (other <= at) if window is None else (other <= at) & (other > at - window)
    return (segments[:, :, None] == other_segments[:, None, :]) & in_reach & (segments > 0)[:, :, None]


def merge_sums(one: Sums, other: Sums) -> Sums:
    """Return the sums over both blocks, rescaled to the larger of the two maxima."""
    largest = jnp.maximum(one[0], other[0])
    shares = (jnp.exp(one[0] - largest), jnp.exp(other[0] - largest))
    total, mixed = (shares[0] * a + shares[1] * b for a, b in zip(one[1:], other[1:], strict=True))
    return largest, total, mixed

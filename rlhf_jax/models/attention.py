"""Rotary positions and causal attention with grouped queries.

Letters in shapes: B rows, S query columns, C key columns, G key/value heads, R query heads per key/value head, K head_dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

_MASKED = -1e30  # finite: a row with nothing to attend to (padding) gives uniform weights instead of NaN


def rotary(x: Float[Array, "B S H K"], positions: Int32[Array, "B S"], theta: float) -> Float[Array, "B S H K"]:
    """Rotate ``x`` by its positions (Su et al. 2021, RoFormer, eq. 34; first half paired with second half as in Llama).

    Angles, sines and the rotation are float32 whatever the dtype of ``x``: bfloat16 cannot tell position 257 from 256.
    Returns the dtype of ``x``.
    """
    half = x.shape[-1] // 2
    inverse_frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions.astype(jnp.float32)[..., None, None] * inverse_frequency  # [B, S, 1, K/2]
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def segment_mask(segment_ids: Int32[Array, "B S"]) -> Bool[Array, "B S S"]:
    """Query column s may attend to key column c: same segment, not padding (segment 0), and c <= s."""
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    length = segment_ids.shape[1]
    causal = jnp.tril(jnp.ones((length, length), dtype=bool))
    return same & causal & (segment_ids > 0)[:, None, :]


def attend(
    query: Float[Array, "B S G R K"],
    key: Float[Array, "B G C K"],
    value: Float[Array, "B G C K"],
    mask: Bool[Array, "B S C"],
    precision: jax.lax.Precision | None,
) -> Float[Array, "B S G R K"]:
    """Softmax attention; scores and softmax in float32, the result in the dtype of ``value``.

    The R query heads of a key/value head are rows of ONE matrix, and the sum of the weights divides the [S, K] result
    instead of the [S, C] weights: both save a pass over the largest array there is here.
    """
    batch, length, groups, per_group, size = query.shape
    rows = query.transpose(0, 2, 3, 1, 4).reshape(batch, groups, per_group * length, size)
    scores = jnp.einsum("bgqk,bgck->bgqc", rows, key, precision=precision, preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, groups, per_group, length, -1) * size**-0.5
    scores = jnp.where(mask[:, None, None], scores, _MASKED)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    total = weights.sum(axis=-1, keepdims=True)  # [B, G, R, S, 1], at least 1
    rows = weights.astype(value.dtype).reshape(batch, groups, per_group * length, -1)
    mixed = jnp.einsum("bgqc,bgck->bgqk", rows, value, precision=precision, preferred_element_type=jnp.float32)
    mixed = (mixed.reshape(batch, groups, per_group, length, size) / total).astype(value.dtype)
    return mixed.transpose(0, 3, 1, 2, 4)

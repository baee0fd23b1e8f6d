"""Causal attention with grouped queries, sliding windows and soft-capped scores.

Letters in shapes: B rows, S query columns, C key columns, G key/value heads, R query heads per key/value head, K head_dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

_MASKED = -1e30  # finite: a row with nothing to attend to (padding) gives uniform weights instead of NaN


def segment_mask(segment_ids: Int32[Array, "B S"], window: int | None = None) -> Bool[Array, "B S S"]:
    """Query column s may attend to key column c: same segment, not padding (segment 0), and s - window < c <= s."""
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    length = segment_ids.shape[1]
    causal = jnp.tril(jnp.ones((length, length), dtype=bool))
    if window is not None:
        causal &= ~jnp.tril(jnp.ones((length, length), dtype=bool), -window)
    return same & causal & (segment_ids > 0)[:, None, :]


def soft_cap(x: Array, cap: float | None) -> Array:
    """cap * tanh(x / cap), within (-cap, cap) (Bello et al. 2016); ``x`` itself without a cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def attend(
    query: Float[Array, "B S G R K"],
    key: Float[Array, "B G C K"],
    value: Float[Array, "B G C K"],
    mask: Bool[Array, "B S C"],
    precision: jax.lax.Precision | None,
    *,
    scale: float | None = None,
    cap: float | None = None,
) -> Float[Array, "B S G R K"]:
    """Softmax attention; scores and softmax in float32, the result in the dtype of ``value``.

    scale: of the scores, None = K^-1/2. cap: `soft_cap` of the scaled scores.
    The R query heads of a key/value head are rows of ONE matrix, and the sum of the weights divides the [S, K] result
    instead of the [S, C] weights: both save a pass over the largest array there is here.
    """
    batch, length, groups, per_group, size = query.shape
    rows = query.transpose(0, 2, 3, 1, 4).reshape(batch, groups, per_group * length, size)
    scores = jnp.einsum("bgqk,bgck->bgqc", rows, key, precision=precision, preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, groups, per_group, length, -1) * (size**-0.5 if scale is None else scale)
    scores = jnp.where(mask[:, None, None], soft_cap(scores, cap), _MASKED)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    total = weights.sum(axis=-1, keepdims=True)  # [B, G, R, S, 1], at least 1
    rows = weights.astype(value.dtype).reshape(batch, groups, per_group * length, -1)
    mixed = jnp.einsum("bgqc,bgck->bgqk", rows, value, precision=precision, preferred_element_type=jnp.float32)
    mixed = (mixed.reshape(batch, groups, per_group, length, size) / total).astype(value.dtype)
    return mixed.transpose(0, 3, 1, 2, 4)

"""Statistics over the entries that count, and masks made from tokens.

Masks are boolean and True means *counts*; one of another dtype raises InputError when it is traced. What lies outside
a mask may be anything, NaN included: it is replaced before any arithmetic, because ``0 * NaN`` is NaN both in a value
and in a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from rlhf_jax.ops.arguments import require_ids, require_mask

Axis = int | tuple[int, ...] | None


def zero_outside(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Return ``x`` as float32, 0 where ``mask`` is False; gradients are exactly 0 there too.

    Apply it to the INPUTS of a per-token loss, not only to its output: with d = NaN at a padding column,
    ``where(mask, exp(d), 0)`` has the value 0 and the gradient ``0 * exp(NaN) = NaN``.
    """
    require_mask("zero_outside", mask=mask)
    return jnp.where(mask, x.astype(jnp.float32), 0.0)


def masked_sum(x: jax.Array, mask: jax.Array, axis: Axis = None) -> jax.Array:
    """Sum of ``x`` over the True entries of ``mask`` (broadcast to x). float32; 0 when nothing counts."""
    return zero_outside(x, jnp.broadcast_to(mask, x.shape)).sum(axis=axis)


def masked_mean(x: jax.Array, mask: jax.Array, axis: Axis = None) -> jax.Array:
    """Return the mean of ``x`` over the True entries of ``mask``. float32; 0 when nothing counts (never 0/0).

    A loss must not be built from this: a mean of microbatch means is not the mean. Losses carry total and weight
    (Term).
    """
    return masked_sum(x, mask, axis) / jnp.maximum(_count(x, mask, axis), 1.0)


def masked_var(x: jax.Array, mask: jax.Array, axis: Axis = None, ddof: int = 0) -> jax.Array:
    """Return the variance of ``x`` over the True entries of ``mask``: ``sum((x - mean)^2) / (n - ddof)``. float32.

    Two passes: ``E[x^2] - E[x]^2`` cancels catastrophically in float32 (values near 1000 with variance 1e-4 give 0 or a
    negative number). ddof=0 is the biased estimate (Ziegler et al. 2019), ddof=1 Bessel's. With n <= ddof the sum is
    divided by 1, so a single entry has variance 0 instead of NaN.
    """
    squares = jnp.square(_centred(x, mask, axis))
    return squares.sum(axis=axis) / jnp.maximum(_count(x, mask, axis) - ddof, 1.0)


def whiten(
    x: jax.Array, mask: jax.Array, *, ddof: int = 0, shift_mean: bool = True, epsilon: float = 1e-8
) -> jax.Array:
    """Return ``(x - mean) / sqrt(variance + epsilon)`` with the statistics of ALL True entries; float32, 0 outside ``mask``.

    shift_mean=False adds the mean back: the scale is normalised and the mean stays. That is how rewards are whitened
    (openai/lm-human-preferences @ cbfd210, ``utils/core.py``); advantages use shift_mean=True. ddof=0 is the variance
    of that repository, ddof=1 the one of later ones. Under ``jit`` with global arrays the statistics are those of the
    whole batch on any mesh.

    Example: x = [1, 2, 3, 4 | 99 masked]: mean 2.5, biased variance 1.25, result [-1.3416, -0.4472, 0.4472, 1.3416 |
    0].
    """
    scale = jax.lax.rsqrt(masked_var(x, mask, ddof=ddof) + epsilon)
    whitened = _centred(x, mask, None) * scale
    if not shift_mean:
        whitened = whitened + masked_mean(x, mask)
    return jnp.where(jnp.broadcast_to(mask, x.shape), whitened, 0.0)


def _count(x: jax.Array, mask: jax.Array, axis: Axis) -> jax.Array:
    """Count the True entries along ``axis``, float32."""
    return jnp.broadcast_to(mask, x.shape).astype(jnp.float32).sum(axis=axis)


def _centred(x: jax.Array, mask: jax.Array, axis: Axis) -> jax.Array:
    """Return ``x - mean`` on the True entries, 0 elsewhere, same shape as ``x``.

    The mean is subtracted twice: a float32 mean of equal values is off by an ulp or so, which ``1 / sqrt(epsilon)`` =
    10^4 in ``whiten`` would blow up to visible "advantages" where all are equal. The second pass removes that residue.
    """
    count = jnp.maximum(jnp.expand_dims(_count(x, mask, axis), _dims(x, axis)), 1.0)
    counted = jnp.broadcast_to(mask, x.shape)
    values = zero_outside(x, counted)
    for _ in range(2):
        values = jnp.where(counted, values - values.sum(axis=axis, keepdims=True) / count, 0.0)
    return values


def _dims(x: jax.Array, axis: Axis) -> tuple[int, ...]:
    """Return the axes that a reduction over ``axis`` removes."""
    if axis is None:
        return tuple(range(x.ndim))
    return axis if isinstance(axis, tuple) else (axis,)


def end_mask(tokens: jax.Array, eos_ids: int | Sequence[int]) -> jax.Array:
    """Return a mask up to and including the first end-of-sequence token. tokens: int [..., T] -> bool [..., T].

    eos_ids: one id or several (chat models end with either of two). The mask comes from the position of the first end,
    never from a pad id, so a model whose pad is its end token is handled: [7, 2, 2, 2] with eos = pad = 2 gives
    [True, True, False, False].
    """
    require_ids("end_mask", tokens=tokens)
    ids = jnp.atleast_1d(jnp.asarray(eos_ids, dtype=jnp.int32))
    is_end = (tokens[..., None] == ids).any(axis=-1).astype(jnp.int32)
    ends_before = jnp.cumsum(is_end, axis=-1) - is_end
    return ends_before == 0


def positions_from_mask(mask: jax.Array) -> jax.Array:
    """Return the position of every token, counting real tokens only: the EXCLUSIVE cumulative sum of the mask. int32 [..., S].

    Works for left, right and inner padding (openai/lm-human-preferences @ cbfd210, ``language/model.py``). Example:
    [token, pad, pad] followed by three response tokens gives [0, 1, 1, 1, 2, 3].
    """
    require_mask("positions_from_mask", mask=mask)
    counts = mask.astype(jnp.int32)
    return jnp.cumsum(counts, axis=-1) - counts


def first_true(mask: jax.Array) -> jax.Array:
    """Return a mask of the first True entry of every row, for values that count once a row. bool [..., T] -> bool [..., T]."""
    require_mask("first_true", mask=mask)
    return mask & (jnp.cumsum(mask.astype(jnp.int32), axis=-1) == 1)


def last_true_index(mask: jax.Array) -> jax.Array:
    """Return the column of the last True entry of every row, -1 where a row has none. bool [..., T] -> int32 [...].

    -1 matches no column in ``columns == index[:, None]``; clamp it before using it as an index, where it would wrap.
    """
    require_mask("last_true_index", mask=mask)
    columns = jnp.arange(mask.shape[-1], dtype=jnp.int32)
    return jnp.where(mask, columns, -1).max(axis=-1)

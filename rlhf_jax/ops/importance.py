"""Weights for samples that another distribution drew than the one they are taken for: an older policy, or a sampler whose
numbers differ from the scorer's."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from rlhf_jax.errors import InputError
from rlhf_jax.ops.arguments import require_same_shape, require_within
from rlhf_jax.ops.losses import MAX_LOG_RATIO
from rlhf_jax.ops.masking import masked_mean, masked_sum, zero_outside

ImportanceUnit = Literal["token", "sequence", "geometric"]
OutsideBounds = Literal["clip", "drop"]


def importance_weights(
    logprobs: jax.Array, sampled: jax.Array, mask: jax.Array, unit: ImportanceUnit = "token"
) -> jax.Array:
    """Return ``probability under the policy / probability under the sampler``, float32 [B, T], constants; 0 outside ``mask``.

    logprobs, sampled: [B, T]. unit: of every "token" by itself; one for the "sequence", the product over its tokens,
    unbiased and of great variance; "geometric": its geometric mean, exp of the mean log ratio (the ratio of GSPO). Logs,
    and sums of logs, are clamped to +-20 before ``exp``. Raises InputError for another unit.

    Example: policy [-1, -2, -.3], sampled [-1.1, -3, -.25]: tokens [1.105171, 2.718282, .951229], sequence exp(1.05) =
    2.857651, geometric exp(.35) = 1.419068.
    """
    require_same_shape("importance_weights", logprobs=logprobs, sampled=sampled, mask=mask)
    logs = zero_outside(jax.lax.stop_gradient(logprobs.astype(jnp.float32) - sampled.astype(jnp.float32)), mask)
    if unit == "sequence":
        logs = jnp.broadcast_to(masked_sum(logs, mask, axis=1)[:, None], mask.shape)
    elif unit == "geometric":
        logs = jnp.broadcast_to(masked_mean(logs, mask, axis=1)[:, None], mask.shape)
    elif unit != "token":
        raise InputError(f"importance unit={unit!r}: use one of 'token', 'sequence', 'geometric'")
    return zero_outside(jnp.exp(jnp.clip(logs, -MAX_LOG_RATIO, MAX_LOG_RATIO)), mask)


def bounded_importance(weights: jax.Array, low: float, high: float, outside: OutsideBounds) -> jax.Array:
    """Bound ``weights`` to [low, high], same shape.

    Weights outside become the bound ("clip"; with low 0 truncated importance sampling) or 0 ("drop"; IcePop for tokens, masked
    importance sampling for sequences). Raises InputError unless 0 <= low <= high.

    Example, bounds .5 and 2: [.4, 1.1, 2.7] -> clip [.5, 1.1, 2], drop [0, 1.1, 0].
    """
    require_within("bounded_importance", "low", low, 0.0, high)
    if outside == "clip":
        return jnp.clip(weights, low, high)
    if outside == "drop":
        return jnp.where((weights >= low) & (weights <= high), weights, 0.0)
    raise InputError(f"importance outside={outside!r}: use 'clip' or 'drop'")

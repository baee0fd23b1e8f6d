"""Log-probabilities of given tokens, in float32, with the temperature applied to the LOGITS.

Every log-probability of a run (sampler, policy, reference, entropy) is taken under ``softmax(logits / temperature)``.
Dividing log-probabilities instead gives something that does not sum to one: logits [2, 1, 0] at temperature 0.7 have
log-probabilities [-0.2601, -1.6887, -3.1173], not [-0.5823, -2.0109, -3.4394].
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from rlhf_jax.errors import InputError
from rlhf_jax.ops.arguments import require_ids, require_mask, require_rows, require_same_shape
from rlhf_jax.ops.masking import zero_outside

Unembed = Callable[[jax.Array], jax.Array]
"""hidden [B, C, D] -> logits float32 [B, C, V]."""


def token_logprobs(logits: jax.Array, targets: jax.Array, temperature: float | jax.Array = 1.0) -> jax.Array:
    """Return the log-probability of ``targets`` under ``softmax(logits / temperature)``.

    logits: any float [..., V]; -inf marks a token that cannot occur (padded vocabulary). targets: int [...]; one outside
    the vocabulary (-100 marks what is ignored elsewhere) has the log-probability NaN: mask it.
    Returns float32 [...]: ``logit[target] - logsumexp(logits)``, without a [..., V] array of log-probabilities.
    """
    _check_targets("token_logprobs", logits, targets)
    scaled = _scaled(logits, temperature)
    chosen = _picked(scaled, targets)
    return chosen - jax.nn.logsumexp(scaled, axis=-1)


def entropy_from_logits(logits: jax.Array, temperature: float | jax.Array = 1.0) -> jax.Array:
    """Return the entropy of ``softmax(logits / temperature)`` in nats, ``-sum p log p``. [..., V] -> float32 [...].

    ``logsumexp(l) - sum p l`` is the same and loses digits: logits near 50 cost it 1e-4 of a nat in float32.

    A logit of -inf contributes nothing (p log p -> 0), also to the gradient.
    """
    scaled = _scaled(logits, temperature)
    logprobs = scaled - jax.nn.logsumexp(scaled, axis=-1, keepdims=True)
    finite = jnp.where(jnp.isneginf(logprobs), 0.0, logprobs)  # 0 * -inf would be NaN
    return -(jnp.exp(logprobs) * finite).sum(axis=-1)


def hidden_logprobs(
    hidden: jax.Array,
    unembed: Unembed,
    targets: jax.Array,
    *,
    temperature: float | jax.Array = 1.0,
    chunk_size: int,
    mask: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Return log-probabilities and entropies from hidden states; the [B, S, V] logits never exist, nor does their gradient.

    hidden: [B, S, D]. unembed: hidden slice -> float32 logits (it may close over parameters being differentiated).
    targets: int [B, S], see `token_logprobs`. mask: bool [B, S] or None; where False the hidden state is replaced by
    0 and both results are 0, so garbage there reaches neither values nor gradients. Returns two float32 [B, S].

    Runs over slices of ``chunk_size`` COLUMNS, so that one [B, chunk_size, V] block of logits exists at a time, and in
    the backward pass the block and its gradient. The backward pass computes the logits of a block again (one more
    unembedding) and reads them once: of the forward pass it keeps two numbers a token. The batch axis is left whole: it
    stays sharded as it was. Example: B 8, S 2048, V 49152 is 3.2 GB of float32 logits; with chunk_size 128 it is 0.2 GB
    at a time.
    """
    if chunk_size < 1:
        raise InputError(f"hidden_logprobs: chunk_size={chunk_size}: set it to 1 or more columns")
    _check_targets("hidden_logprobs", hidden, targets)
    if mask is not None:
        require_mask("hidden_logprobs", mask=mask)
        require_same_shape("hidden_logprobs", targets=targets, mask=mask)
    length = targets.shape[1]
    counted = jnp.ones(targets.shape, jnp.bool_) if mask is None else mask
    hidden = jnp.where(counted[..., None], hidden, jnp.zeros((), hidden.dtype))
    chunk = min(chunk_size, length)

    def one_chunk(inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return logprobs_and_entropy(_scaled(unembed(inputs[0]), temperature), inputs[1])

    # Inside a scan XLA cannot merge the recomputation with the forward pass, so the barrier of prevent_cse is not
    # needed.
    policy = jax.checkpoint_policies.save_only_these_names(_STATISTICS_NAME)
    step = jax.checkpoint(one_chunk, prevent_cse=False, policy=policy)
    logprobs, entropy = jax.lax.map(step, (_chunks(hidden, chunk), _chunks(targets, chunk)))
    return (
        zero_outside(_joined(logprobs, length), counted),
        zero_outside(_joined(entropy, length), counted),
    )


_STATISTICS_NAME = "softmax_statistics"
"""What `hidden_logprobs` keeps for its backward pass: logsumexp and entropy of each token."""


_IMPOSSIBLE = -1e9
"""Stands for a log-probability of -inf: its exponential is 0, and 0 * -inf would be NaN. Not the smallest float32, which
overflows to -inf when an incoming gradient above 1 multiplies it."""


@jax.custom_vjp
def logprobs_and_entropy(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Compute ``token_logprobs`` and ``entropy_from_logits`` at temperature 1 in one pass, with a gradient in one pass.

    logits: float32 [..., V], a row of which is not all -inf. targets: int [...], see `token_logprobs`. Returns two float32
    [...].

    Forward, with m the largest logit and s = sum exp(l - m): logprob = l[target] - m - log s, entropy = log s -
    sum p (l - m), in which nothing large cancels. Backward, for incoming gradients g and h of the two:
    ``dl = g (onehot - p) - h p (log p + entropy)``, an array of V per token where automatic differentiation of the two
    functions makes several.
    """
    _check_targets("logprobs_and_entropy", logits, targets)
    return _forward(logits, targets)[0]


_Statistics = tuple[jax.Array, jax.Array, jax.Array, jax.Array]
"""logits [..., V], targets, logsumexp and entropy [...]."""


def _forward(logits: jax.Array, targets: jax.Array) -> tuple[tuple[jax.Array, jax.Array], _Statistics]:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    weights = jnp.exp(shifted)
    total = weights.sum(axis=-1)
    mixed = (weights * jnp.maximum(shifted, _IMPOSSIBLE)).sum(axis=-1)
    entropy = jnp.log(total) - mixed / total
    normaliser = jnp.log(total) + logits.max(axis=-1)
    chosen = _picked(logits, targets)
    normaliser, entropy = checkpoint_name((normaliser, entropy), _STATISTICS_NAME)
    return (chosen - normaliser, entropy), (logits, targets, normaliser, entropy)


def _backward(residuals: _Statistics, incoming: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
    logits, targets, normaliser, entropy = residuals
    for_logprob, for_entropy = incoming
    logprobs = jnp.maximum(logits - normaliser[..., None], _IMPOSSIBLE)
    hit = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) == targets[..., None]
    slope = for_logprob[..., None] + for_entropy[..., None] * (logprobs + entropy[..., None])
    return jnp.where(hit, for_logprob[..., None], 0.0) - jnp.exp(logprobs) * slope, None


logprobs_and_entropy.defvjp(_forward, _backward)


def _picked(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Return the logit of each target, NaN for a target outside the vocabulary (negative ones would count from its end)."""
    inside = jnp.where(targets < 0, logits.shape[-1], targets)
    return jnp.take_along_axis(logits, inside[..., None], axis=-1, mode="fill", fill_value=jnp.nan)[..., 0]


def _check_targets(function: str, logits: jax.Array, targets: jax.Array) -> None:
    require_ids(function, targets=targets)
    require_rows(function, logits, targets=targets)


def _scaled(logits: jax.Array, temperature: float | jax.Array) -> jax.Array:
    """Return ``logits / temperature`` in float32."""
    if isinstance(temperature, (int, float)) and not temperature > 0:
        raise InputError(f"temperature={temperature}: a log-probability needs a temperature above 0")
    return logits.astype(jnp.float32) / temperature


def _chunks(x: jax.Array, chunk: int) -> jax.Array:
    """Split [B, S, ...] into [number of chunks, B, chunk, ...], the last chunk padded with zeros."""
    batch, length = x.shape[:2]
    fill = -length % chunk
    padded = jnp.pad(x, [(0, 0), (0, fill)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(padded.reshape(batch, -1, chunk, *x.shape[2:]), 1, 0)


def _joined(chunks: jax.Array, length: int) -> jax.Array:
    """Join [number of chunks, B, chunk] to [B, length], the inverse of ``_chunks``."""
    return jnp.moveaxis(chunks, 0, 1).reshape(chunks.shape[1], -1)[:, :length]

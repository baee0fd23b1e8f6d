"""Log-probabilities of given tokens, in float32, with the temperature applied to the LOGITS.

Every log-probability of a run (sampler, policy, reference, entropy) is taken under ``softmax(logits / temperature)``.
Dividing log-probabilities instead gives something that does not sum to one: logits [2, 1, 0] at temperature 0.7 have
log-probabilities [-0.2601, -1.6887, -3.1173], not [-0.5823, -2.0109, -3.4394].
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rlhf_jax.ops.masking import zero_outside
from rlhf_jax.types import InputError

Unembed = Callable[[jax.Array], jax.Array]
"""hidden [B, C, D] -> logits float32 [B, C, V]."""


def token_logprobs(logits: jax.Array, targets: jax.Array, temperature: float | jax.Array = 1.0) -> jax.Array:
    """Log-probability of ``targets`` under ``softmax(logits / temperature)``.

    logits: any float [..., V]; -inf marks a token that cannot occur (padded vocabulary). targets: int [...].
    Returns float32 [...]: ``logit[target] - logsumexp(logits)``, without a [..., V] array of log-probabilities.
    """
    scaled = _scaled(logits, temperature)
    chosen = jnp.take_along_axis(scaled, targets[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(scaled, axis=-1)


def entropy_from_logits(logits: jax.Array, temperature: float | jax.Array = 1.0) -> jax.Array:
    """Entropy of ``softmax(logits / temperature)`` in nats, ``-sum p log p``. [..., V] -> float32 [...].

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
    """Log-probabilities and entropies from hidden states; the [B, S, V] logits never exist, nor does their gradient.

    hidden: [B, S, D]. unembed: hidden slice -> float32 logits (it may close over parameters being differentiated).
    targets: int [B, S]. mask: bool [B, S] or None; where False the hidden state is replaced by 0 and both results are
    0, so garbage there reaches neither values nor gradients. Returns two float32 [B, S].

    Runs over slices of ``chunk_size`` COLUMNS under ``jax.checkpoint``, so that peak memory is B * chunk_size * V
    floats, forward and backward, for one more unembedding of compute. The batch axis is left whole: it stays sharded as
    it was. Example: B 8, S 2048, V 49152 is 3.2 GB of float32 logits; with chunk_size 128 it is 0.2 GB at a time.
    """
    if chunk_size < 1:
        raise InputError(f"hidden_logprobs: chunk_size={chunk_size}: set it to 1 or more columns")
    length = targets.shape[1]
    counted = jnp.ones(targets.shape, jnp.bool_) if mask is None else mask
    hidden = jnp.where(counted[..., None], hidden, jnp.zeros((), hidden.dtype))
    chunk = min(chunk_size, length)

    def one_chunk(inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        logits = unembed(inputs[0])
        return token_logprobs(logits, inputs[1], temperature), entropy_from_logits(logits, temperature)

    # Inside a scan XLA cannot merge the recomputation with the forward pass, so the barrier of prevent_cse is not
    # needed.
    step = jax.checkpoint(one_chunk, prevent_cse=False)
    logprobs, entropy = jax.lax.map(step, (_chunks(hidden, chunk), _chunks(targets, chunk)))
    return (
        zero_outside(_joined(logprobs, length), counted),
        zero_outside(_joined(entropy, length), counted),
    )


def _scaled(logits: jax.Array, temperature: float | jax.Array) -> jax.Array:
    """``logits / temperature`` in float32."""
    if isinstance(temperature, (int, float)) and not temperature > 0:
        raise InputError(f"temperature={temperature}: a log-probability needs a temperature above 0")
    return logits.astype(jnp.float32) / temperature


def _chunks(x: jax.Array, chunk: int) -> jax.Array:
    """[B, S, ...] -> [number of chunks, B, chunk, ...], the last chunk filled up with zeros."""
    batch, length = x.shape[:2]
    fill = -length % chunk
    padded = jnp.pad(x, [(0, 0), (0, fill)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(padded.reshape(batch, -1, chunk, *x.shape[2:]), 1, 0)


def _joined(chunks: jax.Array, length: int) -> jax.Array:
    """[number of chunks, B, chunk] -> [B, length]: the inverse of ``_chunks``."""
    return jnp.moveaxis(chunks, 0, 1).reshape(chunks.shape[1], -1)[:, :length]

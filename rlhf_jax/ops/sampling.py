"""Choosing the next token, with random bits that belong to the token and not to the batch.

The noise of a token depends on (run key, prompt id, sample id, position) alone: every row has its own key, so batch
size, row order, refilled slots and mesh change nothing. Element v of a row's noise depends on v alone
(``threefry2x32``, partitionable), so a vocabulary padded with -inf logits samples the same tokens too.

The noise has mode "low", pinned because a flag can change its default: 23 random bits per number, noise at most 15.9.
A token whose probability is below about 1e-7 is therefore sampled with a slightly wrong probability; mode "high" would
cost 2.5 times the time of the noise (30 ms instead of 12 ms for 16 rows of 49152 on two CPU cores).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rlhf_jax.ops.logprobs import token_logprobs
from rlhf_jax.types import InputError


def token_keys(rng: jax.Array, prompt_id: jax.Array, sample_id: jax.Array, position: jax.Array) -> jax.Array:
    """One key per row: ``fold_in(fold_in(fold_in(rng, prompt_id), sample_id), position)``.

    rng: a typed ``threefry2x32`` key, already folded with the iteration. prompt_id, sample_id: int32 [B]
    (non-negative). position: int32 [B] or [], the column of the response that is being sampled, from 0. Returns keys
    [B].
    """

    def one(prompt: jax.Array, sample: jax.Array, column: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(rng, prompt), sample), column)

    return jax.vmap(one)(prompt_id, sample_id, jnp.broadcast_to(position, prompt_id.shape))


def sample_tokens(
    logits: jax.Array, keys: jax.Array, *, temperature: float, top_k: int = 0, top_p: float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """Sample one token per row: (tokens int32 [B], logprobs float32 [B]).

    logits: [B, V], -inf for tokens that must not occur. keys: [B], from ``token_keys``. The three settings are static.
    temperature 0 is greedy (keys unused, lowest id wins a tie) and the log-probability is then the one at temperature
    1. top_k 0 and top_p 1 switch the truncations off. Order as in transformers: temperature, top_k, top_p of what is
    left.

    ``logprobs`` are those of ``softmax(logits / temperature)`` BEFORE truncation, what a scorer recomputes from the
    same logits. With a truncation on, the sampled distribution is a renormalised one and importance ratios are biased.
    Raises InputError for settings out of range.
    """
    if not (temperature >= 0 and top_k >= 0 and 0 < top_p <= 1):
        raise InputError(
            f"sampling: temperature={temperature}, top_k={top_k}, top_p={top_p}: "
            "need temperature >= 0, top_k >= 0, 0 < top_p <= 1"
        )
    logits = logits.astype(jnp.float32)
    if temperature == 0:
        tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return tokens, token_logprobs(logits, tokens)
    allowed = truncate_logits(logits / temperature, top_k=top_k, top_p=top_p)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:], jnp.float32, mode="low"))(keys)
    tokens = jnp.argmax(allowed + noise, axis=-1).astype(jnp.int32)  # Gumbel-max: argmax(l + g) ~ softmax(l)
    return tokens, token_logprobs(logits, tokens, temperature)


def truncate_logits(logits: jax.Array, *, top_k: int, top_p: float) -> jax.Array:
    """``logits`` [B, V] (temperature already applied) with what top_k and then top_p exclude set to -inf.

    top_k keeps the k largest. top_p keeps the smallest set of most likely tokens whose probability reaches top_p, the
    crossing token INCLUDED: probabilities [.5, .3, .2], top_p .6 keeps two. Tokens tied with the last kept one are
    kept.
    """
    if 0 < top_k < logits.shape[-1]:
        smallest = jax.lax.top_k(logits, top_k)[0][..., -1:]
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    if top_p < 1.0:
        ranked = -jnp.sort(-logits, axis=-1)
        probabilities = jax.nn.softmax(ranked, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        smallest = jnp.where(before < top_p, ranked, jnp.inf).min(axis=-1, keepdims=True)
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    return logits

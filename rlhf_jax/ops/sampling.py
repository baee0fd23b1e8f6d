"""Choosing the next token, with random bits that belong to the token and not to the batch.

The noise of a token depends on (run key, prompt id, sample id, position) alone: every row has its own key, so batch
size, row order, refilled slots and mesh change nothing. Element v of a row's noise depends on v alone
(``threefry2x32``, partitionable), so a vocabulary padded with -inf logits samples the same tokens too.

The noise has mode "low", pinned because a flag can change its default: 23 random bits per number, noise at most 15.9.
A token whose probability is below about 1e-7 is therefore sampled with a slightly wrong probability; mode "high" would
cost 2.5 times the time of the noise (30 ms instead of 12 ms for 16 rows of 49152 on two CPU cores).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from rlhf_jax.errors import InputError
from rlhf_jax.ops.arguments import require_mask, require_rows, require_same_shape, require_threefry
from rlhf_jax.ops.logprobs import token_logprobs


def token_keys(rng: jax.Array, prompt_id: jax.Array, sample_id: jax.Array, position: jax.Array) -> jax.Array:
    """Return one key per row: ``fold_in(fold_in(fold_in(rng, prompt_id), sample_id), position)``.

    rng: a typed ``threefry2x32`` key, already folded with the iteration. prompt_id, sample_id: int32 [B]
    (non-negative). position: int32 [B] or [], the column of the response that is being sampled, from 0. Returns keys
    [B].
    """

    require_threefry("token_keys", rng)
    require_same_shape("token_keys", prompt_id=prompt_id, sample_id=sample_id)

    def one(prompt: jax.Array, sample: jax.Array, column: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(rng, prompt), sample), column)

    return jax.vmap(one)(prompt_id, sample_id, jnp.broadcast_to(position, prompt_id.shape))


def sample_tokens(
    logits: jax.Array,
    keys: jax.Array,
    *,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    adjusted: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sample one token per row: (tokens int32 [B], raw log-probabilities float32 [B], those it was drawn with, too).

    logits: [B, V], -inf for tokens that must not occur. keys: [B], from ``token_keys``. The settings are static.
    adjusted: [B, V], what to draw from instead (penalties, forbidden tokens). temperature 0 is greedy (keys unused,
    lowest id wins a tie); the raw log-probability is then the one at temperature 1, and that of the draw is 0. top_k 0,
    top_p 1 and min_p 0 switch the truncations off. Order as in transformers: temperature, top_k, top_p, min_p.

    Raw log-probabilities are those of ``softmax(logits / temperature)`` before adjustment and truncation, what a scorer
    recomputes from the same logits. The token was drawn from the adjusted, truncated, renormalised distribution: with
    any of these on, importance ratios of the raw ones are biased. Raises InputError for settings out of range.
    """
    _check_truncation(top_k, top_p, min_p)
    if not 0 <= temperature < math.inf:
        raise InputError(f"sampling: temperature={temperature}: need a number >= 0")
    require_threefry("sample_tokens", keys)
    require_rows("sample_tokens", logits, keys=keys)
    if adjusted is not None:
        require_same_shape("sample_tokens", logits=logits, adjusted=adjusted)
    logits = logits.astype(jnp.float32)
    adjusted_logits = logits if adjusted is None else adjusted.astype(jnp.float32)
    if temperature == 0:
        tokens = jnp.argmax(adjusted_logits, axis=-1).astype(jnp.int32)
        return tokens, token_logprobs(logits, tokens), jnp.zeros(tokens.shape, jnp.float32)
    allowed = truncate_logits(adjusted_logits / temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:], jnp.float32, mode="low"))(keys)
    tokens = _first_largest(allowed + noise)  # Gumbel-max: argmax(l + g) ~ softmax(l)
    raw = token_logprobs(logits, tokens, temperature)
    same = adjusted is None and top_k == 0 and top_p == 1 and min_p == 0
    return tokens, raw, raw if same else token_logprobs(allowed, tokens)


def _first_largest(x: jax.Array) -> jax.Array:
    """Return ``argmax`` over the last axis as two plain reductions, int32 (of a row with NaN the last index).

    XLA on a CPU fuses the noise into argmax's reduction of pairs and then computes it without vector instructions: for 16
    rows of 49152 sampling took 23 ms of CPU time so, and takes 8 ms.
    """
    index = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
    last = x.shape[-1] - 1
    return jnp.where(x == x.max(axis=-1, keepdims=True), index, last).min(axis=-1)


def truncate_logits(logits: jax.Array, *, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> jax.Array:
    """Set to -inf the ``logits`` [B, V] (temperature already applied) that top_k, then top_p, then min_p exclude.

    top_k keeps the k largest. top_p keeps the smallest set of most likely tokens whose probability reaches top_p, the
    crossing token INCLUDED: probabilities [.5, .3, .2], top_p .6 keeps two. min_p keeps tokens at least min_p times as
    likely as the most likely one (Nguyen et al. 2024): min_p .5 keeps [.5, .3]. Tokens tied with the last kept one are
    kept. Raises InputError for settings out of range.
    """
    _check_truncation(top_k, top_p, min_p)
    if 0 < top_k < logits.shape[-1]:
        smallest = jax.lax.top_k(logits, top_k)[0][..., -1:]
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    if top_p < 1.0:
        ranked = -jnp.sort(-logits, axis=-1)
        probabilities = jax.nn.softmax(ranked, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        smallest = jnp.where(before < top_p, ranked, jnp.inf).min(axis=-1, keepdims=True)
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    if min_p > 0.0:  # p / p_max is the exponential of a difference of logits, whatever was cut before
        smallest = logits.max(axis=-1, keepdims=True) + math.log(min_p)
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    return logits


def _check_truncation(top_k: int, top_p: float, min_p: float) -> None:
    whole = isinstance(top_k, int) and not isinstance(top_k, bool)
    if not (whole and top_k >= 0 and 0 < top_p <= 1 and 0 <= min_p <= 1):
        raise InputError(
            f"sampling: top_k={top_k}, top_p={top_p}, min_p={min_p}: need a whole top_k >= 0, 0 < top_p <= 1, 0 <= min_p <= 1"
        )


def penalise_repetition(logits: jax.Array, occurred: jax.Array, penalty: float) -> jax.Array:
    """Make tokens that occurred already less likely, by ``penalty``.

    ``logits`` [B, V] of tokens in ``occurred`` (bool [B, V]) are divided by the penalty when positive and
    multiplied otherwise (Keskar
    et al. 2019, CTRL, section 4.1; the sign rule as in
    transformers). Example: penalty 2 makes [2, -1] to [1, -2]. Raises InputError for a penalty of 0 or less."""
    require_mask("penalise_repetition", occurred=occurred)
    require_same_shape("penalise_repetition", logits=logits, occurred=occurred)
    if not 0 < penalty < math.inf:
        raise InputError(f"penalise_repetition: penalty = {penalty!r}: give a number above 0")
    return jnp.where(occurred, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)

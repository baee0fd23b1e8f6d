"""Sampling completions: prefill, then a while loop of single-token decodes, all inside one jitted function."""

from __future__ import annotations

import dataclasses
from types import UnionType
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from rlhf_jax import ops
from rlhf_jax.models import KVCache, Model
from rlhf_jax.types import Completions, InputError, Params, PromptBatch, Rng


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """temperature: 0 = greedy. top_k (0 = off), top_p (1 = off): truncation, which biases PPO's ratio; leave off there.
    max_new_tokens: columns of the response. A completion ends at an end-of-sequence token."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 64

    def __post_init__(self) -> None:
        if not (_is_number(self.temperature) and 0 <= self.temperature < float("inf")):
            raise InputError(f"SamplingConfig.temperature = {self.temperature!r}: give a number >= 0")
        if not _is_number(self.top_k, int) or self.top_k < 0:
            raise InputError(f"SamplingConfig.top_k = {self.top_k!r}: give a whole number >= 0 (0 = off)")
        if not _is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise InputError(f"SamplingConfig.top_p = {self.top_p!r}: give a number in (0, 1]")
        if not _is_number(self.max_new_tokens, int) or self.max_new_tokens < 1:
            raise InputError(f"SamplingConfig.max_new_tokens = {self.max_new_tokens!r}: give a whole number >= 1")


def _is_number(value: object, kind: type | UnionType = int | float) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def generate(
    model: Model,
    params: Params,
    prompts: PromptBatch,
    rng: Rng,
    *,
    sampling: SamplingConfig,
    eos_ids: tuple[int, ...],
    pad_id: int,
) -> Completions:
    """Sample one completion per row of ``prompts`` (left-padded, [B, P]); returns tokens [B, sampling.max_new_tokens].

    Random bits depend on (rng, prompt_id, sample_id, response position) only, see `ops.token_keys`. Stops early when
    every row has ended. Pure: jit it with model, sampling, eos_ids and pad_id static. Raises InputError when prompt and
    response columns together exceed the model's max_length.
    """
    batch, width = prompts.tokens.shape
    length = sampling.max_new_tokens
    if width + length > model.config.max_length:
        raise InputError(
            f"generate: {width} prompt columns and SamplingConfig.max_new_tokens = {length} exceed the model's max_length "
            f"= {model.config.max_length}: shorten one of them"
        )
    lengths = prompts.mask.sum(axis=1).astype(jnp.int32)
    positions = ops.positions_from_mask(prompts.mask)
    hidden, cache = model.prefill(params, prompts.tokens, prompts.mask, positions, width + length)
    stops = jnp.asarray(eos_ids, jnp.int32)

    def sample(hidden: Array, column: Array) -> tuple[Array, Array]:
        keys = ops.token_keys(rng, prompts.prompt_id, prompts.sample_id, column)
        logits = model.logits(params, hidden)[:, 0]
        return ops.sample_tokens(
            logits, keys, temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p
        )

    State = tuple[Array, Array, KVCache, Array, Array, Array, Array]

    def running(state: State) -> Array:
        column, ended = state[0], state[4]
        return (column < length) & ~ended.all()

    def advance(state: State) -> Any:
        column, hidden, cache, tokens, ended, mask, logprobs = state
        token, logprob = sample(hidden, column)
        token = jnp.where(ended, pad_id, token)
        tokens = tokens.at[:, column].set(token)
        mask = mask.at[:, column].set(~ended)
        logprobs = logprobs.at[:, column].set(jnp.where(ended, 0.0, logprob))
        ended = ended | jnp.isin(token, stops)
        hidden, cache = model.decode(params, token[:, None], (lengths + column)[:, None], cache)
        return column + 1, hidden, cache, tokens, ended, mask, logprobs

    start = (
        jnp.zeros((), jnp.int32),
        hidden,
        cache,
        jnp.full((batch, length), pad_id, jnp.int32),
        jnp.zeros((batch,), bool),
        jnp.zeros((batch, length), bool),
        jnp.zeros((batch, length), jnp.float32),
    )
    _, _, _, tokens, ended, mask, logprobs = jax.lax.while_loop(running, advance, start)
    return Completions(prompts=prompts, tokens=tokens, mask=mask, logprobs=logprobs, ended=ended)

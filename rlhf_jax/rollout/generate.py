"""Sampling of completions: prefill, single-token decoding and slot refill, all inside one jitted function."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array

from rlhf_jax.batches import PromptBatch
from rlhf_jax.errors import InputError
from rlhf_jax.models import Model
from rlhf_jax.rollout.settings import ALL_AT_ONCE, SamplingConfig, SlotConfig
from rlhf_jax.rollout.slots import (
    Job,
    Slots,
    admit,
    compact_slots,
    decode_until,
    fill_slots,
    flush,
    read_prefix,
    read_prompts,
)
from rlhf_jax.types import Completions, Params, Rng


def generate(
    model: Model,
    params: Params,
    prompts: PromptBatch,
    rng: Rng,
    *,
    sampling: SamplingConfig,
    eos_ids: tuple[int, ...],
    pad_id: int,
    samples: int = 1,
    slots: SlotConfig = ALL_AT_ONCE,
    stop_table: Array | None = None,
) -> Completions:
    """Sample ``samples`` completions of every prompt (left-padded, [N, P]): tokens [N * samples, sampling.max_new_tokens].

    Completion r is number r % samples of prompt r // samples, which is read once for all of them; its sample_id is the
    prompt's * samples + that number.
    Random bits depend only on (rng, prompt_id or the prompt's own seed, sample_id, response position), see
    `ops.token_keys`: slots change when something is computed, not what is sampled.
    stop_table: `data.stop_table` of sampling.stop_strings, required when there are any.
    Sampling stops when every row has ended. Pure: jit it with model, sampling, eos_ids, pad_id, samples and slots
    static.
    Raises InputError when prompt and response columns together exceed the model's max_length.
    """
    width, length = prompts.tokens.shape[1], sampling.max_new_tokens
    if width + length > model.config.max_length:
        raise InputError(
            f"generate: {width} prompt columns and SamplingConfig.max_new_tokens = {length} exceed the model's max_length "
            f"= {model.config.max_length}: shorten one of them"
        )
    if slots.shared_prefix >= width:
        raise InputError(
            f"generate: SlotConfig.shared_prefix = {slots.shared_prefix} must be below the prompt width of {width} columns"
        )
    if samples < 1:
        raise InputError(f"generate: samples = {samples}: must be at least 1")
    vocabulary = model.config.vocab_size
    static_ids = [number for number in (*eos_ids, pad_id) if not isinstance(number, jax.core.Tracer)]
    if outside := [number for number in static_ids if not 0 <= number < vocabulary]:
        raise InputError(f"generate: eos_ids or pad_id {outside[0]}: the vocabulary has the ids 0 to {vocabulary - 1}")
    if bool(sampling.stop_strings) != (stop_table is not None):
        raise InputError("generate: stop_table goes with SamplingConfig.stop_strings: make it with data.stop_table")
    prompts, stop_table = jax.tree.map(jnp.asarray, (prompts, stop_table))
    job = Job(model, params, prompts, rng, sampling, samples, eos_ids, pad_id, stop_table, slots)
    if slots.separate_layers:
        job = dataclasses.replace(job, layers=model.separate_layers(params))
    if slots.shared_prefix:
        job = dataclasses.replace(job, prefix=read_prefix(job))
    wide = min(slots.slots or job.rows, job.rows)
    queue = wide < job.rows  # refilled slots use the whole ring
    columns = length if queue else -(-length // slots.ring_stages)
    state = fill_slots(job, read_prompts(job, 0, -(-wide // samples)), wide, columns)
    if queue:
        state = _serve_queue(job, state, wide, slots)
    else:
        state = _grow(job, state, wide // 2 if wide // 2 >= slots.smallest > 0 else 0)
    return _as_completions(job, _finish(job, state, wide, slots.smallest))


def _serve_queue(job: Job, state: Slots, wide: int, slots: SlotConfig) -> Slots:
    """Decode until the last row has entered a slot.

    Prompts are read in groups of a fixed size, when all rows of the group before have entered; the rows of a group
    enter slots as they become free.
    """
    count, first_prompts = job.rows // job.samples, wide // job.samples
    size = min(slots.prefill or -(-wide // job.samples), count)

    def serve(group: Array, state: Slots) -> Slots:
        first = first_prompts + group * size
        last = jnp.minimum((first + size) * job.samples, job.rows)
        staged = read_prompts(job, first, size)

        def enter(state: Slots) -> Slots:
            state = decode_until(job, state, wide - slots.refill_at)
            return admit(job, state, staged, last)

        served: Slots = jax.lax.while_loop(lambda state: state.waiting < last, enter, state)
        return served

    served: Slots = jax.lax.fori_loop(0, -(-(count - first_prompts) // size), serve, state)
    return served


def _grow(job: Job, state: Slots, running: int) -> Slots:
    """Decode until the cache has all its columns.

    Decoding runs until no more than ``running`` slots are active or the cache is full; then the cache grows by the same
    number of columns.
    """
    columns, step = job.width + job.sampling.max_new_tokens, state.cache.positions.shape[1] - job.width
    while (capacity := state.cache.positions.shape[1]) < columns:
        state = decode_until(job, state, running)
        state = dataclasses.replace(state, cache=state.cache.pad_columns(min(capacity + step, columns)))
    return state


def _finish(job: Job, state: Slots, wide: int, smallest: int) -> Slots:
    """Decode until every slot has ended, in ever fewer slots."""
    while smallest and wide // 2 >= smallest:
        wide //= 2
        state = compact_slots(job, decode_until(job, state, wide), wide)
    return flush(job, decode_until(job, state, 0))


def _as_completions(job: Job, state: Slots) -> Completions:
    results, prompts, samples = state.results, job.prompts, job.samples
    mask = jnp.arange(results.text.tokens.shape[1]) < results.count[:, None]
    repeated = jax.tree.map(lambda x: jnp.repeat(x, samples, axis=0), prompts)
    numbers = prompts.sample_id[:, None] * samples + jnp.arange(samples, dtype=jnp.int32)
    apart = results.text.sampled_logprobs
    return Completions(
        prompts=dataclasses.replace(repeated, sample_id=numbers.reshape(-1)),
        tokens=results.text.tokens,
        mask=mask,
        logprobs=results.text.logprobs,
        ended=results.ended,
        sampled_logprobs=results.text.logprobs if apart is None else apart,
        slot_steps=results.slot_steps,
    )

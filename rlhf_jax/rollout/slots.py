"""Continuous batching: a pure decoding loop over S slots, one completion each, refilled inside the jitted loop.

The cache has P + T columns: those of the prompt, then a ring of T. Every decode step writes one column of the ring, the
same for all slots, so a step needs no scatter; a completion lives at most T steps, hence none of its columns is written
over before it ends. A refilled slot gets the columns of another prompt, and its ring becomes empty (its positions there
become -1). Example, P = 1, T = 3, two slots, completions a (1 token), b (3 tokens), c (2 tokens):

    step      0        1        2        3
    writes    ring 0   ring 1   ring 2   ring 0
    slot 0    a0 end   c0       c1 end
    slot 1    b0       b1       b2 end

Sliding-window layers have a separate ring of as many columns as their window (`KVCache.recent`), in which a prompt's last
tokens are rolled such that the next column follows them.

Letters: S slots, N prompts, R = N * samples completions ("rows"; row r is a sample of prompt r // samples), P prompt
columns, T response columns.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int32

from rlhf_jax import ops
from rlhf_jax.batches import PromptBatch
from rlhf_jax.models import KVCache, Model, SeparateLayer, empty_cache
from rlhf_jax.rollout.settings import SamplingConfig, SlotConfig
from rlhf_jax.types import Params, Rng


@dataclasses.dataclass(frozen=True)
class Job:
    """The constants of a call of `generate`.

    prompts: [N, P]. stop_table: int [states, V] of `data.stop_table`, or None. layers: `Model.separate_layers`, or None
    to decode with a loop over the stacked ones. prefix: cache of the shared prefix (`read_prefix`), or None.
    """

    model: Model
    params: Params
    prompts: PromptBatch
    rng: Rng
    sampling: SamplingConfig
    samples: int
    eos_ids: tuple[int, ...]
    pad_id: int
    stop_table: Array | None
    slots: SlotConfig
    layers: list[SeparateLayer] | None = None
    prefix: KVCache | None = None

    @property
    def width(self) -> int:
        """P, the prompt columns."""
        return int(self.prompts.tokens.shape[1])

    @property
    def window(self) -> int | None:
        """Columns of the cache of sliding-window layers, None: no separate cache (`KVCache.recent`)."""
        window = self.model.config.sliding_window
        return window if window is not None and window < self.width + self.sampling.max_new_tokens else None

    @property
    def rows(self) -> int:
        """R, the number of completions."""
        return int(self.prompts.tokens.shape[0]) * self.samples


@struct.dataclass
class Work:
    """The state of the completion in each slot; every field is [S, ...] and replaced when another completion enters.

    row: int32, index of the completion. noise_id (of the prompt), sample_id: int32, for the random bits. prompt_length:
    int32, tokens without padding. begin: int32, ring column of its first token. count: int32, tokens so far. running,
    ended: bool. steps: int32, decode steps since it entered. hidden: [S, 1, D], the hidden state from which the next
    token is sampled. stop_state: int32, of the stop table, or None. present: bool [S, V], tokens of prompt and
    response, or None.
    """

    row: Int32[Array, "S"]  # noqa: F821
    noise_id: Int32[Array, "S"]  # noqa: F821
    sample_id: Int32[Array, "S"]  # noqa: F821
    prompt_length: Int32[Array, "S"]  # noqa: F821
    begin: Int32[Array, "S"]  # noqa: F821
    count: Int32[Array, "S"]  # noqa: F821
    running: Bool[Array, "S"]  # noqa: F821
    ended: Bool[Array, "S"]  # noqa: F821
    steps: Int32[Array, "S"]  # noqa: F821
    hidden: Float[Array, "S 1 D"]
    stop_state: Int32[Array, "S"] | None  # noqa: F821
    present: Bool[Array, "S V"] | None


@struct.dataclass
class Sampled:
    """Columns of sampled tokens: rings [S, T] in the slots, finished rows [R, T] in the results.

    sampled_logprobs: None when they equal logprobs.
    """

    tokens: Int32[Array, "S T"]
    logprobs: Float[Array, "S T"]
    sampled_logprobs: Float[Array, "S T"] | None


@struct.dataclass
class Results:
    """Finished completions, by row. count, slot_steps: int32 [R]. ended: bool [R]."""

    text: Sampled
    count: Int32[Array, "R"]  # noqa: F821
    ended: Bool[Array, "R"]  # noqa: F821
    slot_steps: Int32[Array, "R"]  # noqa: F821


@struct.dataclass
class Slots:
    """The state of the decoding loop. waiting: int32 [], the first row that has not entered a slot yet."""

    waiting: Int32[Array, ""]
    work: Work
    cache: KVCache
    ring: Sampled
    results: Results


@struct.dataclass
class Staged:
    """Prompts that were read and wait to be copied into slots. first: index of the first one. cache: P columns."""

    first: Int32[Array, ""]
    prompts: PromptBatch
    hidden: Float[Array, "N 1 D"]
    cache: KVCache


def read_prompts(job: Job, first: int | Array, count: int) -> Staged:
    """Prefill ``count`` prompts from ``first`` on (or the last ``count`` when fewer remain)."""
    first = jnp.minimum(first, job.prompts.tokens.shape[0] - count)
    prompts = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, count), job.prompts)
    tokens, mask, positions = prompts.tokens, prompts.mask, ops.positions_from_mask(prompts.mask)
    if job.prefix is None and not job.slots.prefill_chunk:
        hidden, cache = job.model.prefill(job.params, tokens, mask, positions, job.width, job.slots.cache, job.window)
    else:
        if job.prefix is None:
            prefix_length, cache = 0, empty_cache(job.model.config, count, job.width, job.slots.cache)
        else:
            prefix_length = job.slots.shared_prefix
            cache = job.prefix.take(jnp.zeros((count,), jnp.int32), job.width)
        # The last width - prefix_length columns of left-padded prompts hold all tokens after the prefix.
        mask = (mask & (positions >= prefix_length))[:, prefix_length:]
        hidden, cache = job.model.prefill_after(
            job.params, tokens[:, prefix_length:], mask, positions[:, prefix_length:], cache, job.slots.prefill_chunk
        )
        cache = cache if job.window is None else cache.split_sliding(job.model.config.slides, job.window)
    return Staged(first, prompts, hidden, cache if job.layers is None else cache.separate_layers())


def read_prefix(job: Job) -> KVCache:
    """Return a cache of one row with the first ``slots.shared_prefix`` tokens of the first prompt."""
    length = job.slots.shared_prefix
    tokens, mask = job.prompts.tokens[:1], job.prompts.mask[:1]
    tokens = jax.lax.dynamic_slice_in_dim(tokens, job.width - mask.sum(), length, axis=1)
    positions = jnp.arange(length, dtype=jnp.int32)[None]
    _, cache = job.model.prefill(job.params, tokens, positions >= 0, positions, length, job.slots.cache)
    return cache


def fill_slots(job: Job, staged: Staged, slots: int, columns: int) -> Slots:
    """Put rows 0 ... slots - 1 into slots of their own.

    staged: holds their prompts, from prompt 0 on. columns: of the cache for responses, T unless the cache grows.
    """
    rows = jnp.arange(slots, dtype=jnp.int32)
    if job.samples == 1:  # every row has its prompt already; on a mesh a gather would send the cache to all devices
        cache = staged.cache.pad_columns(job.width + columns)
    else:
        cache = staged.cache.take(rows // job.samples, job.width + columns)
    return Slots(
        waiting=jnp.asarray(slots, jnp.int32),
        work=_new_work(job, staged, rows, jnp.zeros((), jnp.int32)),
        cache=cache,
        ring=_no_text(job, slots),
        results=Results(
            text=_no_text(job, job.rows),
            count=jnp.zeros((job.rows,), jnp.int32),
            ended=jnp.zeros((job.rows,), bool),
            slot_steps=jnp.zeros((job.rows,), jnp.int32),
        ),
    )


def admit(job: Job, state: Slots, staged: Staged, last: Array) -> Slots:
    """Move waiting rows before ``last`` into free slots, as many as fit; completions that ended there go to the results."""
    state = flush(job, state)
    free = ~state.work.running
    count = jnp.minimum(free.sum(), last - state.waiting).astype(jnp.int32)
    place = jnp.cumsum(free).astype(jnp.int32) - 1  # of a free slot among the free ones
    rows = state.waiting + place
    new = _new_work(job, staged, rows, state.cache.index - job.width)
    enters = free & (place < count)

    def chosen(fresh: Array, old: Array) -> Array:
        return jnp.where(enters.reshape(-1, *[1] * (old.ndim - 1)), fresh, old)

    order = jnp.argsort(~free, stable=True).astype(jnp.int32)  # free slots first

    def copy(index: Array, cache: KVCache) -> KVCache:
        prompt = (state.waiting + index) // job.samples - staged.first
        return cache.put(order[index], staged.cache, prompt)

    return dataclasses.replace(
        state,
        waiting=state.waiting + count,
        work=jax.tree.map(chosen, new, state.work),
        cache=jax.lax.fori_loop(0, count, copy, state.cache),
    )


def decode_until(job: Job, state: Slots, running: int) -> Slots:
    """Decode until no more than ``running`` slots are active, or a cache that grows later is full."""
    columns = state.cache.positions.shape[1]

    def more(state: Slots) -> Array:
        busy = state.work.running.sum() > running
        return busy if columns == job.width + job.sampling.max_new_tokens else busy & (state.cache.index < columns)

    decoded: Slots = jax.lax.while_loop(more, lambda state: step(job, state), state)
    return decoded


def step(job: Job, state: Slots) -> Slots:
    """Sample one token for every running slot from its hidden state, store it, and read it."""
    work, running = state.work, state.work.running
    token, logprob, sampled_logprob, is_stop = _sample(job, work)
    token = jnp.where(running, token, job.pad_id)
    column = state.cache.index - job.width

    def write_column(ring: Array, value: Array) -> Array:
        """Write the column; an ended slot keeps its tokens until it is flushed."""
        previous = jax.lax.dynamic_slice_in_dim(ring, column, 1, axis=1)
        value = jnp.where(running[:, None], value[:, None], previous)
        return jax.lax.dynamic_update_slice_in_dim(ring, value, column, axis=1)

    ring = Sampled(
        tokens=write_column(state.ring.tokens, token),
        logprobs=write_column(state.ring.logprobs, logprob),
        sampled_logprobs=None
        if state.ring.sampled_logprobs is None
        else write_column(state.ring.sampled_logprobs, sampled_logprob),
    )
    count = work.count + running
    stop_state = work.stop_state
    if job.stop_table is not None and stop_state is not None:
        stop_state = job.stop_table[stop_state, token].astype(jnp.int32)
        is_stop = is_stop | (stop_state == job.stop_table.shape[0] - 1)
    stops = running & is_stop & (count >= job.sampling.min_new_tokens)
    positions = (work.prompt_length + work.count)[:, None]
    hidden, cache = job.model.decode(job.params, token[:, None], positions, state.cache, job.layers)
    columns = job.width + job.sampling.max_new_tokens
    cache = dataclasses.replace(cache, index=jnp.where(cache.index == columns, job.width, cache.index))
    work = dataclasses.replace(
        work,
        hidden=hidden,
        count=count,
        running=running & ~stops & (count < job.sampling.max_new_tokens),
        ended=work.ended | stops,
        steps=work.steps + 1,
        stop_state=stop_state,
        present=None if work.present is None else work.present.at[jnp.arange(token.shape[0]), token].set(True),
    )
    return dataclasses.replace(state, work=work, cache=cache, ring=ring)


def flush(job: Job, state: Slots) -> Slots:
    """Copy completions from the rings to the results.

    An ended row that stays in its slot is written again later, with more ``slot_steps``.
    """
    work, length = state.work, job.sampling.max_new_tokens
    columns = jnp.arange(length, dtype=jnp.int32)
    source = (work.begin[:, None] + columns) % length
    counts = columns < work.count[:, None]
    target = jnp.where(work.running, job.rows, work.row)  # past the end: dropped

    def unrolled(ring: Array, outside: int | float) -> Array:
        return jnp.where(counts, jnp.take_along_axis(ring, source, axis=1), outside)

    def stored(stack: Array, values: Array) -> Array:
        return stack.at[target].set(values, mode="drop", unique_indices=False)

    ring = state.ring
    sampled = None if ring.sampled_logprobs is None else unrolled(ring.sampled_logprobs, 0.0)
    text = Sampled(unrolled(ring.tokens, job.pad_id), unrolled(ring.logprobs, 0.0), sampled)
    results = Results(text=text, count=work.count, ended=work.ended, slot_steps=work.steps)
    return dataclasses.replace(state, results=jax.tree.map(stored, state.results, results))


def compact_slots(job: Job, state: Slots, slots: int) -> Slots:
    """Return the state with only ``slots`` slots, at least as many as are running."""
    state = flush(job, state)
    order = jnp.argsort(~state.work.running, stable=True)[:slots].astype(jnp.int32)
    work, ring = jax.tree.map(lambda x: jnp.take(x, order, axis=0), (state.work, state.ring))
    return dataclasses.replace(state, work=work, ring=ring, cache=state.cache.take(order))


def _sample(job: Job, work: Work) -> tuple[Array, Array, Array, Array]:
    """Return (token, its raw log-probability, that of the sampling distribution, is it a stop token) of every slot."""
    sampling = job.sampling
    keys = ops.token_keys(job.rng, work.noise_id, work.sample_id, work.count)
    logits = job.model.logits(job.params, work.hidden, few_rows=job.layers is not None)[:, 0]
    stops = jnp.asarray(job.eos_ids, jnp.int32)
    adjusted = None
    if work.present is not None:
        adjusted = ops.penalise_repetition(logits, work.present, sampling.repetition_penalty)
    if sampling.min_new_tokens and job.eos_ids:
        early = (work.count < sampling.min_new_tokens)[:, None]
        barred = early & jnp.zeros((logits.shape[1],), bool).at[stops].set(True)
        adjusted = jnp.where(barred, -jnp.inf, logits if adjusted is None else adjusted)
    token, logprob, sampled_logprob = ops.sample_tokens(
        logits,
        keys,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        adjusted=adjusted,
    )
    return token, logprob, sampled_logprob, jnp.isin(token, stops)


def _new_work(job: Job, staged: Staged, rows: Array, begin: Array) -> Work:
    """Return the initial state for each of ``rows``, int32 [S] (clipped to the staged prompts: ignore the others)."""
    prompt = jnp.clip(rows // job.samples - staged.first, 0, staged.hidden.shape[0] - 1)
    mask = staged.prompts.mask[prompt]
    zeros = jnp.zeros(rows.shape, jnp.int32)
    present = None
    if job.sampling.repetition_penalty != 1.0:
        empty = jnp.zeros((rows.shape[0], job.model.config.vocab_size), bool)
        present = empty.at[jnp.arange(rows.shape[0])[:, None], staged.prompts.tokens[prompt]].max(mask)
    return Work(
        row=rows,
        noise_id=staged.prompts.noise_id[prompt],
        sample_id=staged.prompts.sample_id[prompt] * job.samples + rows % job.samples,
        prompt_length=mask.sum(axis=1).astype(jnp.int32),
        begin=jnp.broadcast_to(begin, rows.shape),
        count=zeros,
        running=jnp.ones(rows.shape, bool),
        ended=jnp.zeros(rows.shape, bool),
        steps=zeros,
        hidden=staged.hidden[prompt],
        stop_state=None if job.stop_table is None else zeros,
        present=present,
    )


def _no_text(job: Job, rows: int) -> Sampled:
    shape, sampling = (rows, job.sampling.max_new_tokens), job.sampling
    raw = sampling == dataclasses.replace(
        sampling, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, min_new_tokens=0
    )
    apart: Any = None if raw and sampling.temperature > 0 else jnp.zeros(shape, jnp.float32)
    return Sampled(jnp.full(shape, job.pad_id, jnp.int32), jnp.zeros(shape, jnp.float32), apart)

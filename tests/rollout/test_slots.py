"""Continuous batching: the samples do not depend on the slots, and slots are well used."""

from __future__ import annotations

import functools
import heapq
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import ops
from rlhf_jax.errors import InputError
from rlhf_jax.models import KVCache, as_token_batch
from rlhf_jax.parallel import ActivationConstraint, to_global, tree_shardings
from rlhf_jax.rollout import SamplingConfig, SlotConfig, generate
from rlhf_jax.testing import mesh_of, prompt_batch, random_prompts, tiny_model
from rlhf_jax.types import Completions

MODEL, PARAMS = tiny_model()
PROMPTS = random_prompts(0, 13, 5, 64)
STOPS = tuple(range(2, 14))
KEY = jax.random.key(11)
SAMPLING = SamplingConfig(temperature=0.7, max_new_tokens=9)
TWICE = np.zeros((3, 64), np.int32)  # a stop table: token 46 twice in a row
TWICE[0, 46], TWICE[1, 46], TWICE[2] = 1, 2, 2


# These programs run for milliseconds and compile for seconds; without LLVM's optimization they compile faster.
compiled = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
)


@functools.partial(compiled, static_argnames=("slots", "samples", "sampling"))
def sample(prompts, slots=SlotConfig(), samples=1, sampling=SAMPLING):  # noqa: B008
    table = TWICE if sampling.stop_strings else None
    settings = {"sampling": sampling, "eos_ids": STOPS, "pad_id": 0, "samples": samples, "slots": slots}
    return generate(MODEL, PARAMS, prompts, KEY, stop_table=table, **settings)


def rows_of(prompts, order):
    return jax.tree.map(lambda x: np.asarray(x)[order], prompts)


def assert_same(actual: Completions, expected: Completions):
    for name in ("tokens", "mask", "ended"):
        np.testing.assert_array_equal(getattr(actual, name), getattr(expected, name))
    np.testing.assert_allclose(actual.logprobs, expected.logprobs, atol=1e-5)
    assert jax.tree.map(np.array_equal, actual.prompts, expected.prompts)


@pytest.fixture(scope="module")
def one_slot_per_row() -> Completions:
    samples = sample(PROMPTS)
    lengths = np.asarray(samples.mask).sum(axis=1)
    assert 1 < samples.ended.sum() < 13 and len(set(lengths.tolist())) > 4  # slots become free at different times
    assert (np.asarray(samples.slot_steps) == 9).all()  # all rows stay in their slots until the longest ends
    return samples


LAYOUTS = {
    "refilled one by one": SlotConfig(slots=3, prefill=1),
    "refilled in groups": SlotConfig(slots=4, prefill=3, refill_at=2),
    "all free before a refill": SlotConfig(slots=5, refill_at=5),
    "one slot": SlotConfig(slots=1),
    "moved together": SlotConfig(slots=4, prefill=2, smallest=1),
}


OFTEN = ("refilled in groups", "moved together")


@pytest.mark.parametrize(
    "name",
    # The slow layouts differ only in how often the same refill happens.
    [pytest.param(name, marks=[pytest.mark.slow] * (name not in OFTEN)) for name in LAYOUTS],
)
def test_slots_change_no_token(name, one_slot_per_row):
    assert_same(sample(PROMPTS, LAYOUTS[name]), one_slot_per_row)


def test_order_changes_no_token(one_slot_per_row):
    order = np.random.default_rng(3).permutation(13)
    shuffled = sample(rows_of(PROMPTS, order), LAYOUTS["refilled in groups"])
    assert_same(shuffled, rows_of(one_slot_per_row, order))


def test_samples_of_a_prompt_equal_those_of_repeated_prompts():
    """Three samples of each prompt against rows of their own; 4 slots and groups of 2 cut a prompt's samples in two."""
    few = rows_of(PROMPTS, np.arange(5))
    apart = rows_of(few, np.repeat(np.arange(5), 3)).replace(sample_id=np.tile(np.arange(3), 5).astype(np.int32))
    expected = sample(apart)
    assert len({tuple(row) for row in np.asarray(expected.tokens).tolist()}) == 15
    assert_same(sample(few, SlotConfig(slots=4, prefill=2, smallest=2), 3), expected)


def test_a_response_ends_with_the_token_of_a_stop_string(one_slot_per_row):
    """In refilled slots, against a search in the responses sampled without stop strings."""
    samples = sample(PROMPTS, SlotConfig(slots=4), sampling=replace(SAMPLING, stop_strings=("as in TWICE",)))
    tokens, lengths = np.asarray(one_slot_per_row.tokens), np.asarray(one_slot_per_row.mask).sum(axis=1)
    twice = (tokens[:, 1:] == 46) & (tokens[:, :-1] == 46)
    stopped = np.where(twice.any(axis=1), twice.argmax(axis=1) + 2, 99)
    np.testing.assert_array_equal(np.asarray(samples.mask).sum(axis=1), np.minimum(stopped, lengths))
    np.testing.assert_array_equal(samples.tokens, np.where(samples.mask, tokens, 0))
    np.testing.assert_array_equal(samples.ended, one_slot_per_row.ended | (stopped <= lengths))
    assert min((stopped < lengths).sum(), (stopped > lengths).sum()) >= 2


@dataclass(frozen=True)
class Counting:
    """A stand-in for a model: it samples token 5 and finally token 1, in all as many as the one prompt token says.

    It reads that number from the cache, so a badly refilled slot would stop elsewhere.
    """

    config = MODEL.config.replace(max_length=1000, vocab_size=256)

    def prefill(self, params, tokens, mask, positions, capacity, storage, window):
        del params, mask, positions, storage, window
        length = tokens[:, 0].astype(jnp.float32)
        keys = jnp.zeros((1, tokens.shape[0], 1, capacity, 1)).at[0, :, 0, 0, 0].set(length)
        positions_in_cache = jnp.full((tokens.shape[0], capacity), -1, jnp.int32).at[:, 0].set(0)
        return length[:, None, None], KVCache(keys, keys, positions_in_cache, jnp.ones((), jnp.int32))

    def decode(self, params, tokens, positions, cache, layers):
        del params, tokens, layers  # position p means: p tokens have been sampled
        remaining = cache.keys[0, :, 0, 0, 0] - positions[:, 0]
        return remaining[:, None, None], cache.replace(index=cache.index + 1)

    def logits(self, params, hidden, few_rows):
        del params, few_rows
        return jnp.where(hidden == 1.0, 99.0 * jax.nn.one_hot(1, 256), 99.0 * jax.nn.one_hot(5, 256))


@functools.partial(compiled, static_argnames=("slots", "samples"))
def counted(prompts, slots, samples):
    settings = {"sampling": SamplingConfig(max_new_tokens=128), "eos_ids": (1,), "pad_id": 0}
    return generate(Counting(), {}, prompts, KEY, slots=slots, samples=samples, **settings)


def count_out(lengths, *, samples: int = 1, sample_ids=None, **slots) -> Completions:
    completions = counted(prompt_batch([[n] for n in lengths], sample_ids=sample_ids), SlotConfig(**slots), samples)
    counts, expected = np.asarray(completions.mask).sum(axis=1), np.repeat(lengths, samples)
    np.testing.assert_array_equal(counts, expected)
    assert completions.ended.all() and (np.asarray(completions.tokens)[np.arange(len(counts)), counts - 1] == 1).all()
    return completions


def test_a_repeated_prompt_has_other_sample_ids():
    """`prompt_batches` numbers a prompt that occurs twice in a batch 0 and 1: its samples must not repeat."""
    samples = count_out([9, 9], samples=2, sample_ids=[0, 1])
    assert samples.prompts.sample_id.tolist() == [0, 1, 2, 3]


def slot_use(samples: Completions) -> float:
    return float(samples.mask.sum() / samples.slot_steps.sum())


LENGTHS = np.random.default_rng(0).integers(8, 129, 64)  # four times as many prompts as slots


def test_slot_steps_are_those_of_a_list_schedule():
    """A simulation where the first free slot takes the next row: every slot works until the last row ends."""
    free = [0] * 16
    for length in LENGTHS:
        heapq.heapreplace(free, free[0] + int(length))
    assert int(count_out(LENGTHS, slots=16, prefill=5).slot_steps.sum()) == 16 * max(free)


def test_slots_use_nine_tenths_where_batches_waste_half():
    static = [count_out(LENGTHS[begin : begin + 16]) for begin in range(0, 64, 16)]
    steps = [16 * LENGTHS[begin : begin + 16].max() for begin in range(0, 64, 16)]
    assert [int(samples.slot_steps.sum()) for samples in static] == steps
    assert LENGTHS.sum() / sum(steps) < 0.6
    assert slot_use(count_out(LENGTHS, slots=16, prefill=4, smallest=1)) >= 0.9


def test_tokens_on_a_mesh_differ_only_at_near_ties():
    """Same random bits, logits within 1e-5: where a token differs, two perturbed logits lie within 2e-5 of each other."""
    prompts = random_prompts(5, 32, 5, 64)
    slots = SlotConfig(slots=16, prefill=8)
    alone = sample(prompts, slots)
    mesh = mesh_of(2, 2, 2)
    model = type(MODEL)(MODEL.config, ActivationConstraint(mesh))
    params = jax.device_put(PARAMS, tree_shardings(model.abstract(), model.logical_axes(), mesh))
    run = compiled(
        functools.partial(generate, model, sampling=SAMPLING, eos_ids=STOPS, pad_id=0, slots=slots),
    )
    samples = run(params, to_global(prompts, mesh), KEY)
    differ = np.asarray(samples.tokens) != np.asarray(alone.tokens)
    logits = full_logits(alone) / SAMPLING.temperature
    for row in np.flatnonzero(differ.any(axis=1)):
        column = int(differ[row].argmax())  # after the first difference the texts differ
        key = ops.token_keys(KEY, jnp.array([row]), jnp.array([0]), jnp.int32(column))[0]
        ranked = np.sort(np.asarray(logits[row, column] + jax.random.gumbel(key, (64,), mode="low")))
        assert ranked[-1] - ranked[-2] < 2e-5
    assert differ.any(axis=1).sum() <= 1
    same = ~differ.any(axis=1)
    np.testing.assert_allclose(np.asarray(samples.logprobs)[same], np.asarray(alone.logprobs)[same], atol=2e-5)


@jax.jit
def _apply(batch):
    return MODEL.apply(PARAMS, batch.tokens, positions=batch.positions, segment_ids=batch.segment_ids)


def full_logits(samples: Completions) -> np.ndarray:
    """Return the logits that predict each response token, by one full forward: [B, T, V]."""
    width = samples.prompts.tokens.shape[1]
    return np.asarray(_apply(as_token_batch(samples)))[:, width - 1 : -1]


def numpy_log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def test_adjusted_logits_follow_a_loop_over_positions():
    """Recompute in numpy, token by token from full forwards: repetition penalty, barred stop tokens, temperature, min_p."""
    settings = SamplingConfig(temperature=0.8, min_p=0.2, repetition_penalty=1.7, min_new_tokens=4, max_new_tokens=9)
    samples = sample(PROMPTS, SlotConfig(slots=3, smallest=1), sampling=settings)
    logits, mask, tokens = full_logits(samples), np.asarray(samples.mask), np.asarray(samples.tokens)
    cut = penalised = barred = 0
    for row in range(13):
        previous = set(np.asarray(PROMPTS.tokens)[row][PROMPTS.mask[row]].tolist())
        for column in range(mask[row].sum()):
            raw = numpy_log_softmax(logits[row, column] / 0.8)
            scores = logits[row, column].astype(np.float64)
            for token in previous:
                scores[token] = scores[token] / 1.7 if scores[token] > 0 else scores[token] * 1.7
            if column < 4:
                barred += scores.argmax() in STOPS
                scores[list(STOPS)] = -np.inf
            scores = numpy_log_softmax(scores / 0.8)
            allowed = scores >= scores.max() + np.log(0.2)
            token = tokens[row, column]
            assert allowed[token]
            np.testing.assert_allclose(samples.logprobs[row, column], raw[token], atol=2e-5)
            renormalised = scores[token] - np.log(np.exp(scores[allowed]).sum())
            np.testing.assert_allclose(samples.sampled_logprobs[row, column], renormalised, atol=2e-5)
            cut, penalised = cut + (~allowed).sum(), penalised + (token in previous)
            previous.add(int(token))
    lengths = mask.sum(axis=1)
    assert cut > 1000 and penalised > 0 and barred > 3 and lengths.min() >= 4 and samples.ended.any()


def test_invalid_settings_are_rejected():
    with pytest.raises(InputError, match="samples = 0: must be at least 1"):
        sample(PROMPTS, samples=0)
    with pytest.raises(InputError, match=r"make it with data\.stop_table"):
        generate(MODEL, PARAMS, PROMPTS, KEY, sampling=SAMPLING, eos_ids=STOPS, pad_id=0, stop_table=TWICE)
    with pytest.raises(InputError, match=r"SlotConfig\.refill_at = 3: more than SlotConfig\.slots = 2"):
        SlotConfig(slots=2, refill_at=3)
    for field, value in (("slots", -1), ("prefill", 1.0), ("refill_at", 0), ("smallest", True)):
        with pytest.raises(InputError, match=rf"SlotConfig\.{field} = "):
            SlotConfig(**{field: value})


def test_a_sliding_window_counts_positions_not_columns():
    """The ring has the tokens of a refilled slot in another order of columns, which must not affect the window."""
    model, params = tiny_model(layer_pattern=("sliding",), sliding_window=4)
    settings = {"sampling": SAMPLING, "eos_ids": STOPS, "pad_id": 0}
    few = rows_of(PROMPTS, np.arange(8))
    run = compiled(functools.partial(generate, model, **settings), static_argnames="slots")
    expected = run(params, few, KEY)
    assert (np.asarray(expected.tokens) != np.asarray(sample(few).tokens)).any()  # the window matters
    assert_same(run(params, few, KEY, slots=SlotConfig(slots=2)), expected)


def test_separate_layers_decode_the_same_tokens(one_slot_per_row):
    """Transposed weights and a cache per layer, in slots that are refilled and compacted.

    The layout of the products differs, so log-probabilities agree up to rounding.
    """
    samples = sample(PROMPTS, SlotConfig(slots=4, prefill=2, smallest=2, separate_layers=True))
    assert_same(samples, one_slot_per_row)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_layers": 5, "layer_pattern": ("sliding", "full"), "sliding_window": 3},  # a scanned pair and a remainder
        {"qkv_bias": True, "output_bias": True, "tie_embeddings": False},
    ],
)
def test_separate_layers_have_the_order_of_stacked_ones(changes):
    model, params = tiny_model(**changes)
    prompts, tokens = rows_of(PROMPTS, np.arange(4)), np.full((4, 1), 20, np.int32)

    @functools.partial(compiled, static_argnames="separate")
    def after_one_token(separate):
        positions = ops.positions_from_mask(prompts.mask)
        _, cache = model.prefill(params, prompts.tokens, jnp.asarray(prompts.mask), positions, 7)
        layers = model.separate_layers(params) if separate else None
        cache = cache.separate_layers() if separate else cache
        hidden, _ = model.decode(params, tokens, positions[:, -1:] + 1, cache, layers)
        return model.logits(params, hidden, few_rows=separate)

    np.testing.assert_allclose(after_one_token(True), after_one_token(False), atol=1e-4, rtol=1e-4)

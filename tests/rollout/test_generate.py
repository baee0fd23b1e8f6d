"""Sampling: tokens, log-probabilities and ends of responses, independent of the batch."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import ops
from rlhf_jax.errors import InputError
from rlhf_jax.models import as_token_batch
from rlhf_jax.rollout import SamplingConfig, generate
from rlhf_jax.testing import prompt_batch, random_prompts, tiny_model
from rlhf_jax.types import Completions

MODEL, PARAMS = tiny_model()
ROWS, WIDTH, LENGTH = 8, 5, 6
PROMPTS = random_prompts(0, ROWS, WIDTH, 64)
STOPS = tuple(range(2, 14))  # twelve of 64 tokens end a response, so that some rows do and some do not
KEY = jax.random.key(11)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def sample(prompts, rng, sampling, eos_ids=STOPS, pad_id=0):
    return generate(MODEL, PARAMS, prompts, rng, sampling=sampling, eos_ids=eos_ids, pad_id=pad_id)


def sampling(**fields) -> SamplingConfig:
    return SamplingConfig(**{"temperature": 0.7, "max_new_tokens": LENGTH, **fields})


@jax.jit
def _logits(batch):
    return MODEL.apply(PARAMS, batch.tokens, positions=batch.positions, segment_ids=batch.segment_ids)


def response_logits(samples: Completions) -> np.ndarray:
    """Return the logits from which each response token was sampled, by one full forward: [B, T, V]."""
    width = samples.prompts.tokens.shape[1]
    return np.asarray(_logits(as_token_batch(samples)))[:, width - 1 : -1]


def test_greedy_is_the_argmax_of_the_full_forward():
    samples = sample(PROMPTS, KEY, sampling(temperature=0.0), ())
    assert samples.mask.all() and not samples.ended.any() and samples.tokens.shape == (ROWS, LENGTH)
    logits = response_logits(samples)
    best = np.sort(logits, axis=-1)
    assert (best[..., -1] - best[..., -2]).min() > 1e-4  # no ties that rounding could decide
    np.testing.assert_array_equal(samples.tokens, logits.argmax(-1))
    np.testing.assert_allclose(samples.logprobs, ops.token_logprobs(jnp.asarray(logits), samples.tokens), atol=1e-5)


@pytest.fixture(scope="module")
def sampled() -> Completions:
    samples = sample(PROMPTS, KEY, sampling())
    assert 1 < samples.ended.sum() < ROWS
    return samples


def test_sampler_and_scorer_agree_on_log_probabilities(sampled):
    """Prefill and cached decoding against one full forward, at the sampling temperature."""
    again = ops.token_logprobs(jnp.asarray(response_logits(sampled)), sampled.tokens, 0.7)
    np.testing.assert_allclose(sampled.logprobs, np.where(sampled.mask, again, 0.0), atol=1e-5)
    assert (np.asarray(sampled.logprobs)[np.asarray(sampled.mask)] < 0).all()
    cold = ops.token_logprobs(jnp.asarray(response_logits(sampled)), sampled.tokens, 1.0)
    assert np.abs(np.where(sampled.mask, again - cold, 0.0)).max() > 0.1  # the temperature matters


def test_a_response_stops_at_the_first_end_and_keeps_it(sampled):
    tokens, mask = np.asarray(sampled.tokens), np.asarray(sampled.mask)
    for row, counted, ended in zip(tokens, mask, sampled.ended, strict=True):
        ends = np.flatnonzero(np.isin(row, STOPS))
        length = counted.sum()
        assert counted.tolist() == [True] * length + [False] * (LENGTH - length)
        assert (row[length:] == 0).all()
        if ended:
            assert ends[0] == length - 1  # the end token is the last counted token, and there is no earlier end token
        else:
            assert length == LENGTH and ends.size == 0
    assert len({row[counted][-1] for row, counted in zip(tokens[sampled.ended], mask[sampled.ended], strict=True)}) > 1
    np.testing.assert_array_equal(mask, ops.end_mask(jnp.asarray(tokens), STOPS) | (mask & ~sampled.ended[:, None]))


def test_end_tokens_do_not_change_earlier_tokens(sampled):
    """Without end tokens the same tokens are sampled, and more: random bits of a position do not depend on ends."""
    free = sample(PROMPTS, KEY, sampling(), ())
    assert free.mask.all() and not free.ended.any()
    np.testing.assert_array_equal(np.where(sampled.mask, free.tokens, 0), sampled.tokens)
    one = sample(PROMPTS, KEY, sampling(), STOPS[:1])
    for row, counted in zip(np.asarray(free.tokens), np.asarray(one.mask), strict=True):
        ends = np.flatnonzero(row == STOPS[0])
        assert counted.sum() == (ends[0] + 1 if ends.size else LENGTH)


def test_min_new_tokens_counts_tokens_before_the_end():
    """Like transformers' MinNewTokensLengthLogitsProcessor, which bars ends while there are fewer than min_new_tokens tokens.

    With all tokens but four ending a response, 3 of those four come first, then an end as the fourth token.
    """
    ends = tuple(range(4, 64))
    samples = sample(PROMPTS, KEY, sampling(min_new_tokens=3), ends)
    for row, count, ended in zip(np.asarray(samples.tokens), samples.mask.sum(axis=1), samples.ended, strict=True):
        generated = next((place for place in range(3, LENGTH) if row[place] in ends), LENGTH - 1)
        assert not np.isin(row[:3], ends).any() and count == generated + 1 and bool(ended) == (row[count - 1] in ends)
    assert samples.mask.sum(axis=1).min() == 4  # the first allowed end is sampled
    longest = sample(PROMPTS, KEY, sampling(min_new_tokens=LENGTH), ends)
    assert longest.mask.all() and not longest.ended.any()


def test_pad_may_be_an_end_token(sampled):
    """pad = end: the mask is that of the sampler's stop, not computed from the tokens."""
    same = sample(PROMPTS, KEY, sampling(), STOPS, STOPS[0])
    for name in ("mask", "ended", "logprobs"):
        np.testing.assert_array_equal(getattr(same, name), getattr(sampled, name))
    np.testing.assert_array_equal(same.tokens, np.where(sampled.mask, sampled.tokens, STOPS[0]))


def rows_of(prompts, order):
    return jax.tree.map(lambda x: np.asarray(x)[order], prompts)


def test_order_and_size_of_the_batch_change_nothing(sampled):
    order = np.array([5, 2, 7, 0, 1, 6, 3, 4])
    shuffled = sample(rows_of(PROMPTS, order), KEY, sampling())
    np.testing.assert_array_equal(shuffled.tokens, np.asarray(sampled.tokens)[order])
    few = sample(rows_of(PROMPTS, [6, 1]), KEY, sampling())
    for name in ("tokens", "mask", "ended"):
        np.testing.assert_array_equal(getattr(few, name), np.asarray(getattr(sampled, name))[[6, 1]])
    np.testing.assert_allclose(few.logprobs, np.asarray(sampled.logprobs)[[6, 1]], atol=1e-5)


def test_left_padding_changes_nothing(sampled):
    wide = PROMPTS.replace(
        tokens=np.pad(PROMPTS.tokens, ((0, 0), (3, 0)), constant_values=9), mask=np.pad(PROMPTS.mask, ((0, 0), (3, 0)))
    )
    np.testing.assert_array_equal(sample(wide, KEY, sampling()).tokens, sampled.tokens)


def test_random_bits_belong_to_prompt_sample_and_key(sampled):
    """Rows with the same text differ by prompt or sample number; the same numbers give the same text."""
    text = [[20, 21, 22]] * ROWS
    ids = {"prompt_ids": [3, 3, 4, 3, 3, 4, 0, 3], "sample_ids": [0, 1, 0, 0, 1, 0, 3, 2]}
    tokens = np.asarray(sample(prompt_batch(text, width=WIDTH, **ids), KEY, sampling(temperature=3.0), ()).tokens)
    np.testing.assert_array_equal(tokens[:3], tokens[3:6])
    kinds = tokens[[0, 1, 2, 6, 7]]
    assert len({tuple(row) for row in kinds}) == 5
    other = sample(PROMPTS, jax.random.key(12), sampling())
    assert (np.asarray(other.tokens) != np.asarray(sampled.tokens)).any(axis=1).all()
    np.testing.assert_array_equal(sample(PROMPTS, KEY, sampling()).tokens, sampled.tokens)


def test_a_prompt_with_a_seed_samples_from_that_alone(sampled):
    """Independent of its place in the batch and its number, and unlike a prompt with that number."""
    text = [[20, 21, 22]] * ROWS
    seeds = np.array([5, 5, 6, 0, 1, 2, 3, 6], np.int32)
    batch = prompt_batch(text, width=WIDTH)
    assert batch.prompt_id.tolist() == list(range(ROWS))
    samples = sample(batch.replace(seed=seeds), KEY, sampling(temperature=3.0), ())
    tokens = np.asarray(samples.tokens)
    np.testing.assert_array_equal(tokens[0], tokens[1])
    np.testing.assert_array_equal(tokens[2], tokens[7])
    assert len({tuple(row) for row in tokens}) == ROWS - 2
    unseeded = np.asarray(sample(batch, KEY, sampling(temperature=3.0), ()).tokens)
    assert not {tuple(row) for row in tokens} & {tuple(row) for row in unseeded}
    np.testing.assert_array_equal(samples.prompts.prompt_id, batch.prompt_id)


def test_frequencies_follow_the_model():
    """4096 samples of one prompt: each of 64 tokens within 5 standard errors of softmax(logits / .7)."""
    count = 4096
    prompts = prompt_batch([[20, 21, 22]] * count, sample_ids=range(count), prompt_ids=[3] * count)
    tokens = sample(prompts, KEY, sampling(max_new_tokens=1), ()).tokens[:, 0]
    logits = MODEL.apply(PARAMS, jnp.array([[20, 21, 22]]))[0, -1]
    expected = np.asarray(jax.nn.softmax(logits / 0.7), np.float64)
    assert 0.02 < expected.max() < 0.9
    frequencies = np.bincount(tokens, minlength=64) / count
    error = np.sqrt(expected * (1 - expected) / count)
    assert (np.abs(frequencies - expected) < 5 * error + 1 / count).all()


def test_top_k_and_top_p_keep_to_their_set():
    """Every token is among the k largest of a full forward, or in the smallest set that reaches p."""
    for fields in ({"top_k": 3}, {"top_p": 0.6}):
        samples = sample(PROMPTS, KEY, sampling(temperature=2.0, **fields), ())
        logits = response_logits(samples) / 2.0
        chosen = np.take_along_axis(logits, np.asarray(samples.tokens)[..., None], axis=-1)
        rank = (logits > chosen).sum(-1)
        if "top_k" in fields:
            assert rank.max() == fields["top_k"] - 1
        else:
            probabilities = np.asarray(jax.nn.softmax(logits, axis=-1))
            before = (probabilities * (logits > chosen)).sum(-1)
            assert (before < 0.6 + 1e-5).all() and rank.max() > 3
        again = ops.token_logprobs(jnp.asarray(logits), samples.tokens)  # of the distribution before truncation
        np.testing.assert_allclose(samples.logprobs, again, atol=1e-5)


def test_a_row_without_a_prompt_does_not_affect_others(sampled):
    """Rows that only fill up an evaluation batch are all padding."""
    filled = PROMPTS.replace(
        tokens=np.where(np.arange(ROWS)[:, None] == 2, 0, PROMPTS.tokens),
        mask=PROMPTS.mask & (np.arange(ROWS)[:, None] != 2),
        prompt_id=np.where(np.arange(ROWS) == 2, -1, PROMPTS.prompt_id).astype(np.int32),
    )
    samples = sample(filled, KEY, sampling())
    assert np.isfinite(samples.logprobs).all()
    real_rows = np.arange(ROWS) != 2
    np.testing.assert_array_equal(np.asarray(samples.tokens)[real_rows], np.asarray(sampled.tokens)[real_rows])


def test_rows_longer_than_max_length_are_rejected():
    model, params = tiny_model(max_length=10)
    with pytest.raises(
        InputError, match="5 prompt columns and .*max_new_tokens = 6 exceed the model's max_length = 10"
    ):
        generate(model, params, PROMPTS, KEY, sampling=sampling(), eos_ids=STOPS, pad_id=0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1), ("temperature", "1"), ("temperature", float("nan")), ("temperature", float("inf")),
        ("top_k", -1), ("top_k", 2.0), ("top_k", True), ("top_p", 0.0), ("top_p", 1.1), ("top_p", float("nan")),
        ("max_new_tokens", 0), ("max_new_tokens", 1.0), ("max_new_tokens", True), ("min_p", -0.1), ("min_p", 1.5),
        ("repetition_penalty", 0), ("repetition_penalty", float("inf")), ("min_new_tokens", -1),
        ("min_new_tokens", 65), ("stop_strings", "x y"), ("stop_strings", [""]),
    ],
)  # fmt: skip
def test_invalid_fields_are_named(field, value):
    with pytest.raises(InputError, match=rf"SamplingConfig\.{field} = "):
        SamplingConfig(**{field: value})

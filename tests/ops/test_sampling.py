from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from scipy import stats

from rlhf_jax.errors import InputError
from rlhf_jax.ops import penalise_repetition, sample_tokens, token_keys, token_logprobs, truncate_logits

RNG = jax.random.key(0, impl="threefry2x32")
ROWS = 12
PROMPTS = jnp.arange(ROWS, dtype=jnp.int32) // 2
SAMPLES = jnp.arange(ROWS, dtype=jnp.int32) % 2
POSITIONS = jnp.asarray(np.random.default_rng(0).integers(0, 50, ROWS), jnp.int32)
LOGITS = jnp.asarray(np.random.default_rng(1).normal(0, 2, (ROWS, 40)), jnp.float32)

# What the first release sampled (jax 0.10.2, CPU); the bits of threefry2x32 are the same on every platform.
PINNED = [30, 16, 28, 4, 6, 0, 33, 39, 17, 39, 5, 17]


def kept_tokens(probabilities, **settings):
    logits = jnp.log(jnp.asarray([probabilities], jnp.float32))
    return np.flatnonzero(np.isfinite(truncate_logits(logits, **{"top_k": 0, "top_p": 1.0} | settings)[0])).tolist()


def test_keys_are_the_documented_chain_and_all_differ():
    keys = token_keys(RNG, PROMPTS, SAMPLES, POSITIONS)
    by_hand = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(RNG, 2), 1), int(POSITIONS[5]))
    np.testing.assert_array_equal(jax.random.key_data(keys[5]), jax.random.key_data(by_hand))
    grid = jnp.stack(jnp.meshgrid(*[jnp.arange(4)] * 3), -1).reshape(-1, 3)
    data = jax.random.key_data(token_keys(RNG, grid[:, 0], grid[:, 1], grid[:, 2]))
    assert len({tuple(row) for row in data.tolist()}) == 64  # swapping two ids is another key


def test_one_position_for_all_rows():
    same = token_keys(RNG, PROMPTS, SAMPLES, jnp.int32(3))
    value = token_keys(RNG, PROMPTS, SAMPLES, jnp.full(ROWS, 3))
    np.testing.assert_array_equal(jax.random.key_data(same), jax.random.key_data(value))


@pytest.mark.parametrize("settings", [{}, {"top_k": 5}, {"top_p": 0.8}])
def test_a_row_does_not_depend_on_the_batch(settings):
    keys = token_keys(RNG, PROMPTS, SAMPLES, POSITIONS)
    whole = sample_tokens(LOGITS, keys, temperature=0.7, **settings)
    order = np.random.default_rng(2).permutation(ROWS)
    permuted = sample_tokens(LOGITS[order], keys[order], temperature=0.7, **settings)
    for together, shuffled in zip(whole, permuted, strict=True):
        np.testing.assert_array_equal(together[order], shuffled)
    for rows in (slice(0, 1), slice(1, 4), slice(4, ROWS)):
        part = sample_tokens(LOGITS[rows], keys[rows], temperature=0.7, **settings)
        for together, alone in zip(whole, part, strict=True):
            np.testing.assert_array_equal(together[rows], alone)


def test_a_row_does_not_depend_on_the_mesh():
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    rows, grid = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec("data", "tensor"))
    keys = token_keys(RNG, PROMPTS, SAMPLES, POSITIONS)
    step = jax.jit(functools.partial(sample_tokens, temperature=0.7))
    sharded = step(jax.device_put(LOGITS, grid), jax.device_put(keys, rows))
    single = step(LOGITS, keys)
    np.testing.assert_array_equal(sharded[0], single[0])
    np.testing.assert_allclose(sharded[1], single[1], atol=1e-6)  # a sharded sum adds up in another order


def test_padded_vocabulary_samples_the_same_tokens():
    keys = token_keys(RNG, PROMPTS, SAMPLES, POSITIONS)
    padded = jnp.pad(LOGITS, ((0, 0), (0, 24)), constant_values=-jnp.inf)
    plain, with_padding = (sample_tokens(x, keys, temperature=1.0)[:2] for x in (LOGITS, padded))
    np.testing.assert_array_equal(plain[0], with_padding[0])
    np.testing.assert_allclose(plain[1], with_padding[1], atol=1e-6)


def test_pinned_tokens():
    """Stored result: a change of the noise (mode, key chain, implementation) would silently change every rollout."""
    tokens, *_ = sample_tokens(LOGITS, token_keys(RNG, PROMPTS, SAMPLES, POSITIONS), temperature=1.0)
    assert tokens.tolist() == PINNED


def draws(logits, count, **settings):
    keys = token_keys(RNG, jnp.arange(count), jnp.zeros(count, jnp.int32), jnp.int32(0))
    tokens, *_ = sample_tokens(jnp.broadcast_to(logits, (count, len(logits))), keys, **settings)
    return np.bincount(tokens, minlength=len(logits))


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_follow_the_distribution(temperature):
    logits = np.array([1.0, 0.0, -1.0, 0.5])
    counts = draws(jnp.asarray(logits, jnp.float32), 20000, temperature=temperature)
    expected = np.exp(logits / temperature) / np.exp(logits / temperature).sum() * 20000
    assert stats.chisquare(counts, expected).pvalue > 1e-3


def test_truncated_samples_are_renormalised():
    # [.5, .3, .15, .05] with top_p .6 keeps [.5, .3]: 5/8 and 3/8
    counts = draws(jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05])), 8000, temperature=1.0, top_p=0.6)
    assert counts[2:].tolist() == [0, 0]
    assert stats.chisquare(counts[:2], [5000, 3000]).pvalue > 1e-3


def test_top_p_includes_the_crossing_token():
    p = [0.2, 0.5, 0.3]
    assert kept_tokens(p, top_p=0.6) == [1, 2]
    assert kept_tokens(p, top_p=0.49) == [1]
    assert kept_tokens(p, top_p=0.81) == [0, 1, 2]
    assert kept_tokens(p, top_p=1e-9) == [1]


def test_min_p_is_relative_to_the_most_likely():
    p = [0.1, 0.4, 0.2, 0.3]
    assert kept_tokens(p, min_p=0.5) == [1, 2, 3]
    assert kept_tokens(p, min_p=0.51) == [1, 3]
    assert kept_tokens(p, min_p=1.0) == [1]
    assert kept_tokens(p, top_p=0.55, min_p=0.1) == [1, 3]  # what top_p cut stays cut
    # .55 of the largest: .22. top_k = 2 leaves [.4, .3], whose ratio .75 is above it.
    assert kept_tokens(p, top_k=2, min_p=0.55) == [1, 3]


def test_repetition_makes_less_likely_whatever_the_sign():
    logits, observed = jnp.array([[2.0, -1.0, 3.0, 0.0]]), jnp.array([[True, True, False, True]])
    np.testing.assert_array_equal(penalise_repetition(logits, observed, 2.0), [[1.0, -2.0, 3.0, 0.0]])
    keys = token_keys(RNG, jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32), jnp.int32(0))
    token, raw, sampled = sample_tokens(logits, keys, temperature=1.0, top_k=1, adjusted=logits - 9.0 * (logits == 3.0))
    assert (token.tolist(), sampled.tolist()) == ([0], [0.0])  # drawn from the adjusted ones
    np.testing.assert_array_equal(raw, token_logprobs(logits, token))  # reported of the others


def test_top_k_and_order_of_truncations():
    p = [0.1, 0.4, 0.2, 0.3]
    assert kept_tokens(p, top_k=2) == [1, 3]
    assert kept_tokens(p, top_k=0) == kept_tokens(p, top_k=4) == kept_tokens(p, top_k=99) == [0, 1, 2, 3]
    # top_k first: [.4, .3] renormalised to [.571, .429], top_p .55 then keeps one; of the untruncated it would keep two
    assert kept_tokens(p, top_k=2, top_p=0.55) == [1]
    assert kept_tokens(p, top_p=0.55) == [1, 3]


def test_ties_with_the_last_kept_token_stay():
    assert kept_tokens([0.25, 0.25, 0.4, 0.1], top_k=2) == [0, 1, 2]
    assert kept_tokens([0.25, 0.25, 0.4, 0.1], top_p=0.5) == [0, 1, 2]


def test_truncation_never_revives_impossible_tokens():
    logits = jnp.array([[0.0, -jnp.inf, 1.0, -jnp.inf]])
    for settings in ({"top_k": 3, "top_p": 1.0}, {"top_k": 0, "top_p": 0.99}):
        assert np.isfinite(truncate_logits(logits, **settings))[0].tolist() == [True, False, True, False]


def test_logprobs_are_those_before_truncation():
    keys = token_keys(RNG, PROMPTS, SAMPLES, POSITIONS)
    tokens, logprobs, sampled = sample_tokens(LOGITS, keys, temperature=0.7, top_k=3, top_p=0.5)
    np.testing.assert_array_equal(logprobs, token_logprobs(LOGITS, tokens, 0.7))
    assert (tokens.dtype, logprobs.dtype) == (jnp.int32, jnp.float32)
    cut = truncate_logits(LOGITS / 0.7, top_k=3, top_p=0.5)
    np.testing.assert_array_equal(sampled, token_logprobs(cut, tokens))
    assert (sampled >= logprobs).all() and (sampled > logprobs + 0.01).any()


def test_top_k_one_is_greedy():
    keys = token_keys(RNG, PROMPTS, SAMPLES, POSITIONS)
    assert (sample_tokens(LOGITS, keys, temperature=2.0, top_k=1)[0] == LOGITS.argmax(-1)).all()


def test_temperature_zero_is_greedy_with_logprobs_at_one():
    logits = jnp.array([[2.0, 1.0, 0.0], [1.0, 3.0, 3.0]])
    tokens, logprobs, sampled = sample_tokens(
        logits, token_keys(RNG, jnp.arange(2), jnp.arange(2), jnp.int32(0)), temperature=0.0
    )
    assert tokens.tolist() == [0, 1]
    # log softmax([2, 1, 0])[0] = -log(1 + e^-1 + e^-2) = -.407606; [1, 3, 3]: -log(2 + e^-2) = -.758624
    np.testing.assert_allclose(logprobs, [-0.407606, -0.758624], atol=1e-6)
    assert sampled.tolist() == [0.0, 0.0]  # of the choice itself, which is certain


def test_bfloat16_logits_are_sampled_in_float32():
    # dividing by .7 in bfloat16 moves a logit of 3 by up to .008: enough to change some of 4000 tokens
    keys = token_keys(RNG, jnp.arange(4000), jnp.zeros(4000, jnp.int32), jnp.int32(0))
    half = jnp.asarray(np.random.default_rng(3).normal(0, 2, (4000, 40)), jnp.bfloat16)
    halves = sample_tokens(half, keys, temperature=0.7)
    floats = sample_tokens(half.astype(jnp.float32), keys, temperature=0.7)
    for actual, exact in zip(halves, floats, strict=True):
        np.testing.assert_array_equal(actual, exact)


@pytest.mark.parametrize("bad", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}, {"min_p": -0.5}])
def test_settings_out_of_range(bad):
    key, value = next(iter(bad.items()))
    with pytest.raises(InputError, match=f"{key}={value}"):
        sample_tokens(LOGITS, None, **{"temperature": 1.0} | bad)

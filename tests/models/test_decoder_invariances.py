"""Invariances of the logits: padding and its contents, other documents of a packed row, the cache, rematerialization."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import ops
from rlhf_jax.models import Model
from rlhf_jax.testing import prompt_batch, random_prompts, tiny_model

VOCAB = 64


@functools.partial(jax.jit, static_argnums=0)
def apply(model: Model, params, tokens, positions=None, segment_ids=None):
    return model.apply(params, tokens, positions=positions, segment_ids=segment_ids)


def left_padded(model, params, prompts):
    return apply(model, params, prompts.tokens, ops.positions_from_mask(prompts.mask), prompts.mask.astype(np.int32))


def test_left_padding_changes_nothing():
    """Any number of pads on the left (fails for a model that counts positions from the first column)."""
    model, params = tiny_model()
    rows = [[5, 6, 7, 8], [9, 10], [11]]
    prompts = prompt_batch(rows, width=7)
    padded = left_padded(model, params, prompts)
    for index, row in enumerate(rows):
        alone = apply(model, params, np.array([row], np.int32))
        np.testing.assert_allclose(padded[index, 7 - len(row) :], alone[0], rtol=1e-5, atol=1e-5)


def test_left_and_right_padding_agree():
    model, params = tiny_model()
    tokens = np.array([[0, 0, 5, 6, 7], [5, 6, 7, 0, 0]], np.int32)
    mask = tokens > 0
    logits = apply(model, params, tokens, ops.positions_from_mask(mask), mask.astype(np.int32))
    np.testing.assert_allclose(logits[0, 2:], logits[1, :3], rtol=1e-5, atol=1e-5)


def test_garbage_in_padding_changes_nothing():
    """Bit for bit: padding has weight exactly 0 in attention, left of the prompt and right of the response."""
    model, params = tiny_model()
    rng = np.random.default_rng(0)
    mask = np.array([[0, 0, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 1, 0]], bool)
    clean = np.where(mask, rng.integers(3, VOCAB, mask.shape), 0).astype(np.int32)
    dirty = np.where(mask, clean, rng.integers(0, VOCAB, mask.shape)).astype(np.int32)
    assert (clean != dirty).any(axis=1)[[0, 2]].all()
    positions, segments = np.asarray(ops.positions_from_mask(mask)), mask.astype(np.int32)
    wild = np.where(mask, positions, 1000).astype(np.int32)  # positions of padding columns are arbitrary, too
    first, second = (apply(model, params, tokens, p, segments) for tokens, p in ((clean, positions), (dirty, wild)))
    np.testing.assert_array_equal(first[mask], second[mask])


def test_packed_documents_do_not_see_each_other():
    model, params = tiny_model()
    documents = [[5, 6, 7], [8, 9, 10, 11], [12, 13]]
    tokens = np.array([[5, 6, 7, 8, 9, 10, 11, 12, 13, 0]], np.int32)
    segments = np.array([[1] * 3 + [2] * 4 + [3] * 2 + [0]], np.int32)
    positions = np.array([[0, 1, 2, 0, 1, 2, 3, 0, 1, 0]], np.int32)
    packed = apply(model, params, tokens, positions, segments)
    start = 0
    for document in documents:
        alone = apply(model, params, np.array([document], np.int32))
        np.testing.assert_allclose(packed[0, start : start + len(document)], alone[0], rtol=1e-5, atol=1e-5)
        start += len(document)
    # the check can fail: without segments the second document sees the first
    leaking = apply(model, params, tokens, positions, np.ones_like(segments))
    assert np.abs(leaking[0, 3:7] - packed[0, 3:7]).max() > 0.1


def test_a_token_cannot_see_the_future():
    model, params = tiny_model()
    tokens = np.random.default_rng(1).integers(3, VOCAB, (1, 8)).astype(np.int32)
    changed = tokens.copy()
    changed[0, 5] += 1 if changed[0, 5] < VOCAB - 1 else -1
    first, second = apply(model, params, tokens), apply(model, params, changed)
    np.testing.assert_array_equal(first[0, :5], second[0, :5])
    assert (np.abs(first[0, 5:] - second[0, 5:]).max(axis=-1) > 1e-3).all()


def test_rope_sees_only_distances():
    """The same text 4000 positions further on: equal up to float32 angles (2.4e-4 rad at 4096)."""
    model, params = tiny_model()
    tokens = np.random.default_rng(2).integers(3, VOCAB, (1, 8)).astype(np.int32)
    near = np.arange(8, dtype=np.int32)[None]
    np.testing.assert_allclose(apply(model, params, tokens, near), apply(model, params, tokens, near + 4000), atol=2e-3)
    stretched = apply(model, params, tokens, near * 2)
    assert np.abs(stretched - apply(model, params, tokens, near)).max() > 0.05


@functools.partial(jax.jit, static_argnums=(0, 3))
def prefilled(model: Model, params, prompts, capacity: int):
    positions = ops.positions_from_mask(prompts.mask)
    hidden, cache = model.prefill(params, prompts.tokens, prompts.mask, positions, capacity)
    return model.logits(params, hidden), cache


@functools.partial(jax.jit, static_argnums=0)
def decoded(model: Model, params, tokens, positions, cache):
    hidden, cache = model.decode(params, tokens, positions, cache)
    return model.logits(params, hidden), cache


def decoded_logits(model: Model, params, prompts, capacity: int, continuation):
    """Return logits [B, 1 + T, V] after the prompt and after each of the T tokens, computed with the cache."""
    logits, cache = prefilled(model, params, prompts, capacity)
    outputs, lengths = [logits], prompts.mask.sum(axis=1).astype(np.int32)
    for column in range(continuation.shape[1]):
        token = continuation[:, column : column + 1]
        logits, cache = decoded(model, params, token, (lengths + column)[:, None], cache)
        outputs.append(logits)
    return jnp.concatenate(outputs, axis=1), cache


SLIDING = {"num_layers": 3, "layer_pattern": ("sliding", "full"), "sliding_window": 3, "attention_soft_cap": 2.0}
LEARNED = {"positions": "learned", "norm": "layer"}


@pytest.mark.parametrize(("extra", "changes"), [(0, {}), (5, {}), (0, SLIDING), (5, LEARNED)])
def test_cached_decoding_equals_the_full_forward(extra, changes):
    model, params = tiny_model(**changes)
    prompts = random_prompts(0, 4, 6, VOCAB)
    continuation = np.random.default_rng(1).integers(3, VOCAB, (4, 5)).astype(np.int32)
    cached, cache = decoded_logits(model, params, prompts, 6 + 5 + extra, continuation)
    mask = np.concatenate([prompts.mask, np.ones_like(continuation, bool)], axis=1)
    tokens = np.concatenate([prompts.tokens, continuation], axis=1)
    full = apply(model, params, tokens, ops.positions_from_mask(mask), mask.astype(np.int32))
    np.testing.assert_allclose(cached, full[:, 5:], rtol=1e-5, atol=1e-5)
    assert int(cache.index) == 11 and cache.keys.shape[3] == 11 + extra
    np.testing.assert_array_equal(cache.valid, np.pad(mask, ((0, 0), (0, extra))))


@pytest.mark.parametrize("remat", [True, "cheap"])
def test_rematerialisation_changes_neither_logits_nor_gradients(remat):
    model, params = tiny_model(num_layers=3)
    remat = Model(model.config.replace(remat=remat))
    tokens = np.random.default_rng(3).integers(3, VOCAB, (2, 6)).astype(np.int32)

    def logits_and_gradients(model):
        def loss(params):
            logits = model.apply(params, tokens)
            return ops.token_logprobs(logits[:, :-1], tokens[:, 1:]).mean(), logits

        (_, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        return logits, grads

    (plain, plain_grads), (recomputed, remat_grads) = logits_and_gradients(model), logits_and_gradients(remat)
    np.testing.assert_array_equal(plain, recomputed)
    for first, second in zip(jax.tree.leaves(plain_grads), jax.tree.leaves(remat_grads), strict=True):
        assert np.abs(first).max() > 1e-5
        np.testing.assert_allclose(first, second, rtol=1e-5, atol=1e-6)  # sums of float32 up to 1


def test_memory_of_the_backward_pass():
    """12 layers x 8 rows x 64 columns: all activations need more than the products with weights, those more than block inputs."""
    tokens = np.ones((8, 64), np.int32)

    def temp_bytes(remat):
        model, params = tiny_model(num_layers=12, remat=remat)
        step = jax.jit(jax.grad(lambda params: model.apply(params, tokens).sum()))
        return step.lower(params).compile().memory_analysis().temp_size_in_bytes

    no_remat, products, inputs = temp_bytes(False), temp_bytes("cheap"), temp_bytes(True)
    assert no_remat > 1.5 * products > 1.5 * 1.2 * inputs

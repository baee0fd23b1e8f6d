"""Scoring in chunks: the numbers and gradients of the direct computation, without its [B, S, V] logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import learn
from rlhf_jax.batches import TokenBatch
from rlhf_jax.models import Model, ModelConfig, sequence_logprobs
from rlhf_jax.testing import tiny_model

MODEL, PARAMS = tiny_model("lm", tie_embeddings=False)


def batch_of(rows: int, length: int, vocabulary: int) -> TokenBatch:
    draw = np.random.default_rng(0)
    return TokenBatch(
        tokens=draw.integers(0, vocabulary, (rows, length)).astype(np.int32),
        positions=np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length)),
        segment_ids=np.ones((rows, length), np.int32),
        loss_mask=draw.random((rows, length)) < 0.7,
    )


def direct(model, params, batch):
    """Return (logprobs, entropy) from whole logits by jax.nn.log_softmax."""
    logprobs = jax.nn.log_softmax(model.apply(params, batch.tokens)[:, :-1])
    chosen = jnp.take_along_axis(logprobs, batch.tokens[:, 1:, None], axis=-1)[..., 0]
    entropy = -(jnp.exp(logprobs) * logprobs).sum(axis=-1)
    counted = batch.loss_mask[:, 1:]
    return tuple(jnp.pad(jnp.where(counted, x, 0.0), ((0, 0), (1, 0))) for x in (chosen, entropy))


@pytest.mark.parametrize("columns", [1, 4, 128])
def test_scores_and_gradients_equal_the_direct_ones(columns):
    batch = batch_of(3, 10, 64)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 10)), jnp.float32)
    sliced = Model(MODEL.config.replace(logits_chunk=columns))

    def total(score, model):
        def of(params):
            logprobs, entropy = score(model, params, batch)
            return (weights[0] * logprobs + weights[1] * entropy).sum(), (logprobs, entropy)

        return jax.jit(jax.value_and_grad(of, has_aux=True))(PARAMS)

    (_, values), grads = total(sequence_logprobs, sliced)
    (_, expected), expected_grads = total(direct, MODEL)
    for actual, reference in zip(
        jax.tree.leaves((values, grads)), jax.tree.leaves((expected, expected_grads)), strict=True
    ):
        np.testing.assert_allclose(actual, reference, atol=1e-5, rtol=1e-5)


def test_an_sft_step_needs_less_memory_than_its_logits():
    config = ModelConfig(131072, 32, 1, 2, 2, 16, 64)
    rows, length = 2, 512
    logits = rows * length * config.vocab_size * 4  # bytes of float32 [B, S, V]: 537 MB

    def temporary(columns: int) -> int:
        model = Model(config.replace(logits_chunk=columns))
        adam = learn.make_optimizer(learn.OptimizerConfig(), 10)
        step = learn.make_train_step(learn.make_sft_loss(lambda p, b: sequence_logprobs(model, p, b)), adam)
        rng = jax.random.key(0)
        state = jax.eval_shape(lambda: learn.initial_state(model.init(rng), adam, rng))
        compiled = jax.jit(step, donate_argnums=0).lower(state, {}, batch_of(rows, length, 64)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(length) > 2 * logits  # the measure includes the logits when they exist
    assert temporary(32) < 0.6 * logits

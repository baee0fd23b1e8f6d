"""Supervised learning reaches the entropy of a source whose entropy is known."""

from __future__ import annotations

import functools
import math

import jax
import numpy as np

from rlhf_jax import learn
from rlhf_jax.batches import TokenBatch
from rlhf_jax.models import Model, sequence_logprobs
from rlhf_jax.testing import tiny_config

LETTERS, REPEAT, LENGTH, ROWS = 8, 0.9, 24, 32
FLOOR = -(
    (REPEAT + (1 - REPEAT) / LETTERS) * math.log(REPEAT + (1 - REPEAT) / LETTERS)
    + (1 - REPEAT) * (LETTERS - 1) / LETTERS * math.log((1 - REPEAT) / LETTERS)
)
"""Entropy of the next token, .467 nats: the letter three places back with probability .9, else any of eight (itself too).
A model that does not look back cannot get below log 8 = 2.079."""


def draw(rng: np.random.Generator, rows: int) -> TokenBatch:
    """Rows of ids 3 ... 10; the first three tokens are random and are no targets."""
    letters = rng.integers(0, LETTERS, (rows, LENGTH))
    repeated = rng.random((rows, LENGTH)) < REPEAT
    for column in range(3, LENGTH):
        letters[:, column] = np.where(repeated[:, column], letters[:, column - 3], letters[:, column])
    targets = np.tile(np.arange(LENGTH) >= 3, (rows, 1))
    positions = np.tile(np.arange(LENGTH, dtype=np.int32), (rows, 1))
    return TokenBatch((letters + 3).astype(np.int32), positions, np.ones((rows, LENGTH), np.int32), targets)


def test_sft_reaches_the_entropy_floor():
    model = Model(tiny_config(vocab_size=16, hidden_size=32, ffn_size=64, max_length=LENGTH))
    loss = learn.make_sft_loss(functools.partial(sequence_logprobs, model))
    steps = 200
    config = learn.OptimizerConfig(learning_rate=1e-2, schedule="cosine", warmup_steps=20)
    optimizer = learn.make_optimizer(config, steps)
    step = jax.jit(learn.make_train_step(loss, optimizer, microbatches=2), donate_argnums=0)
    params = jax.jit(model.init)(jax.random.key(0))
    state = learn.initial_state(params, optimizer, jax.random.key(1))
    rng = np.random.default_rng(0)
    losses = []
    for _ in range(steps):
        state, metrics = step(state, {}, draw(rng, ROWS))
        losses.append(float(metrics["loss"].value()))
    assert abs(losses[0] - math.log(16)) < 0.1  # at the start: uniform over the vocabulary
    logprobs, entropy = jax.jit(functools.partial(sequence_logprobs, model))(state.params, draw(rng, 512))
    nll, spread = (-np.asarray(x)[:, 3:] for x in (logprobs, -entropy))
    error = nll.std() / math.sqrt(nll.size)
    print(f"held-out {nll.mean():.4f} +- {error:.4f}, floor {FLOOR:.4f}")
    assert FLOOR - 3 * error < nll.mean() < FLOOR + 0.03 + 3 * error
    assert abs(spread.mean() - FLOOR) < 0.05  # and it is as sure as it should be

"""A reward model recovers a planted preference on pairs it has not seen."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import learn
from rlhf_jax.batches import RankedBatch
from rlhf_jax.models import Model, sequence_scores
from rlhf_jax.testing import random_params, tiny_config, token_batch

LIKED, LENGTH, ROWS = 7, 12, 64


def draw(rng: np.random.Generator, pairs: int) -> RankedBatch:
    """Texts of 4 ... 12 tokens; of two the one with more of token 7 is preferred, wherever it stands in the text."""
    sides: tuple[list, list] = ([], [])
    while len(sides[0]) < pairs:
        first, second = (rng.integers(3, 13, rng.integers(4, LENGTH + 1)).tolist() for _ in range(2))
        if first.count(LIKED) != second.count(LIKED):
            better, worse = sorted((first, second), key=lambda text: -text.count(LIKED))
            sides[0].append(better)
            sides[1].append(worse)
    chosen, rejected = (token_batch(side, length=LENGTH) for side in sides)
    return RankedBatch.of_pairs(chosen, rejected)


def test_a_planted_preference_is_recovered():
    model = Model(tiny_config(vocab_size=16, head="scalar", max_length=LENGTH))
    score = functools.partial(sequence_scores, model)
    steps = 150
    optimizer = learn.make_optimizer(learn.OptimizerConfig(learning_rate=1e-2, schedule="linear"), steps)
    step = jax.jit(learn.make_train_step(learn.make_reward_loss(score, centring=0.01), optimizer), donate_argnums=0)
    state = learn.initial_state(jax.tree.map(jnp.asarray, random_params(model, 0)), optimizer, jax.random.key(1))
    rng = np.random.default_rng(0)
    held_out = draw(rng, 512)
    rate = jax.jit(lambda params: learn.pair_scores(score, params, held_out))
    chosen, rejected = (np.asarray(side) for side in rate(state.params))
    before = (chosen > rejected).mean()
    losses = []
    for _ in range(steps):
        state, metrics = step(state, {}, draw(rng, ROWS))
        losses.append(float(metrics["loss/pairwise"].value()))
    assert 0.4 < losses[0] < 1.2  # log 2 and the head's random start
    chosen, rejected = (np.asarray(side) for side in rate(state.params))
    accuracy = (chosen > rejected).mean()
    print(f"held-out accuracy {before:.3f} -> {accuracy:.3f}, last loss {losses[-1]:.3f}")
    assert before < 0.8 and accuracy > 0.95
    # it learned to count: more of the liked token is worth more
    counts = np.array([np.sum(row == LIKED) for row in np.asarray(held_out.rows.tokens)[:, 0]])
    assert np.corrcoef(counts, chosen)[0, 1] > 0.75
    assert abs(np.concatenate([chosen, rejected]).mean()) < np.concatenate([chosen, rejected]).std()  # centred

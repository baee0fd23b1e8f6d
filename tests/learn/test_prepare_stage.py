"""The stage of a step over its whole batch: what it measures does not depend on microbatches, and its key is its own."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.learn import OptimizerConfig, initial_state, make_optimizer, make_train_step
from rlhf_jax.types import Mean, Term

ROWS = jnp.array([1.0, 2.0, 3.0, 6.0])


def centred(params, frozen, batch, rng):
    """Subtract the mean over the batch of w times the numbers."""
    del frozen, rng
    mean = (params["w"] * batch["x"]).mean()
    return batch | {"mean": jnp.full_like(batch["x"], mean)}, {"batch_mean": Mean(mean, jnp.ones(()))}


def squares(params, frozen, batch, rng):
    """(w x - mean)^2, the mean a constant."""
    del frozen, rng
    gap = Mean.of((params["w"] * batch["x"] - batch["mean"]) ** 2)
    return {"squares": Term(gap.total, gap.weight)}, {}


def stepped(microbatches, prepare=centred, loss=squares, batch=None):
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.1), steps=10)
    state = initial_state({"w": jnp.ones(())}, optimizer, jax.random.key(0))
    step = jax.jit(make_train_step(loss, optimizer, microbatches=microbatches, prepare=prepare))
    return step(state, {}, {"x": ROWS} if batch is None else batch)


@pytest.mark.parametrize("microbatches", [1, 2, 4])
def test_a_mean_over_the_batch_by_hand(microbatches):
    """Mean 3, gaps -2, -1, 0, 3: loss 14 / 4; gradient 2 (-2 - 2 + 0 + 18) / 4 = 7, none through the mean, which would take
    2 x 3 x (sum of gaps) = 0 off it. In microbatches of one row every gap to their own mean would be 0."""
    state, metrics = stepped(microbatches)
    assert float(metrics["batch_mean"].value()) == 3.0
    assert float(metrics["loss"].value()) == pytest.approx(3.5)
    assert float(metrics["grad_norm"].value()) == pytest.approx(7.0)
    assert float(state.params["w"]) == float(stepped(1)[0].params["w"])


def test_what_is_prepared_has_no_gradient():
    """The loss w x mean with mean = 3 w: 9 w a row were it followed, 3 x as a constant, whose mean is 9."""

    def loss(params, frozen, batch, rng):
        del frozen, rng
        value = Mean.of(params["w"] * batch["x"] * batch["mean"])
        return {"product": Term(value.total, value.weight)}, {}

    assert float(stepped(2, loss=loss)[1]["grad_norm"].value()) == pytest.approx(9.0)


@pytest.mark.parametrize("microbatches", [1, 2, 4])
def test_its_key_is_no_microbatchs_key(microbatches):
    """Equal keys would make the noise of a statistic the noise of a loss. Neither equals the key of the step."""
    samples = []

    def keep(rng):
        jax.debug.callback(lambda key: samples.append(tuple(key.tolist())), jax.random.key_data(rng))

    def prepare(params, frozen, batch, rng):
        keep(rng)
        return centred(params, frozen, batch, rng)

    def loss(params, frozen, batch, rng):
        keep(rng)
        return squares(params, frozen, batch, rng)

    stepped(microbatches, prepare, loss)
    jax.effects_barrier()
    step = jax.random.fold_in(jax.random.key(0), 0)
    assert len(set(samples)) == 1 + microbatches
    assert tuple(jax.random.key_data(step).tolist()) not in samples
    ahead = jax.random.split(step)[1]
    assert tuple(jax.random.key_data(ahead).tolist()) in samples


def test_without_the_stage_the_program_is_the_same():
    """Byte for byte: nothing is split off the key of the step."""

    def loss(params, frozen, batch, rng):
        del frozen
        noise = Mean.of(params["w"] * batch["x"] + jax.random.uniform(rng, batch["x"].shape))
        return {"noise": Term(noise.total, noise.weight)}, {}

    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.1), steps=10)
    state = initial_state({"w": jnp.ones(())}, optimizer, jax.random.key(0))
    texts = [
        jax.jit(make_train_step(loss, optimizer, microbatches=2, **stage)).lower(state, {}, {"x": ROWS}).as_text()
        for stage in ({}, {"prepare": None})
    ]
    assert texts[0] == texts[1]
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), 0), 2)
    draws = np.mean([jax.random.uniform(key, (2,)) for key in keys])
    after, metrics = jax.jit(make_train_step(loss, optimizer, microbatches=2))(state, {}, {"x": ROWS})
    assert float(metrics["loss"].value()) == pytest.approx(3.0 + draws, rel=1e-6) and int(after.step) == 1


def test_a_number_without_rows_is_refused():
    def prepare(params, frozen, batch, rng):
        del params, frozen, rng
        return batch | {"mean": jnp.ones(())}, {}

    with pytest.raises(InputError, match="batch: an array has no rows to cut; repeat a number of the whole batch"):
        stepped(2, prepare)


@pytest.mark.parametrize("name", ["loss", "grad_norm", "loss/squares"])
def test_a_metric_that_the_step_has_is_refused(name):
    def prepare(params, frozen, batch, rng):
        batch, _ = centred(params, frozen, batch, rng)
        return batch, {name: Mean.of(ROWS)}

    with pytest.raises(InputError, match=f"prepare gives the metric '{name}', which the step has; rename it"):
        stepped(1, prepare)

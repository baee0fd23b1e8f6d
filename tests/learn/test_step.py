"""The training step: exact under any split, silent about masked rows, and a bad batch commits nothing."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.learn import OptimizerConfig, gradients, initial_state, make_optimizer, make_sft_loss, make_train_step
from rlhf_jax.models import sequence_logprobs
from rlhf_jax.testing import tiny_model, token_batch
from rlhf_jax.types import Mean, Term

LOSSES = np.array([[1.0, 1.0, 0.0, 0.0], [2.0, 2.0, 2.0, 2.0]], np.float32)
COUNTED = np.array([[1, 1, 0, 0], [1, 1, 1, 1]], bool)


def weighted_loss(params, frozen, batch, rng):
    """Loss of a token: w times its given number. d/dw of the mean is the mean of the numbers."""
    del frozen, rng
    nll = Mean.of(params["w"] * batch["losses"], batch["mask"])
    return {"nll": Term(nll.total, nll.weight)}, {"mean": Mean.of(batch["losses"], batch["mask"])}


def compute(loss, params, batch, microbatches, frozen=None):
    call = jax.jit(lambda p, f, b: gradients(loss, p, f, b, jax.random.key(0), microbatches))
    return call(params, frozen or {}, batch)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_losses_of_one_and_two_over_a_split(microbatches):
    """[1, 1] and [2, 2, 2, 2]: 10 / 6 = 1.666667, gradient the same; the mean of the two means would be 1.5."""
    batch = {"losses": LOSSES, "mask": COUNTED}
    grads, metrics = compute(weighted_loss, {"w": jnp.ones(())}, batch, microbatches)
    for value in (grads["w"], metrics["loss"].value(), metrics["loss/nll"].value(), metrics["mean"].value()):
        assert float(value) == pytest.approx(10 / 6, abs=1e-6)
    assert float(metrics["loss/nll"].weight) == 6.0


def test_several_terms_each_over_its_own_weight():
    def loss(params, frozen, batch, rng):
        del frozen, rng
        a, b = Mean.of(params["w"] * batch["x"]), Mean.of(params["w"] ** 2 * batch["x"], batch["keep"])
        return {"a": Term(a.total, a.weight), "b": Term(b.total, b.weight, -0.5)}, {}

    batch = {"x": jnp.array([1.0, 2.0, 3.0, 6.0]), "keep": jnp.array([True, False, False, True])}
    # mean a = 3 w; mean b = 3.5 w^2; loss = 3 w - 1.75 w^2: 1.25 at w = 1, gradient 3 - 3.5 = -.5
    for microbatches in (1, 2, 4):  # with 4 some microbatches count nothing of b
        grads, metrics = compute(loss, {"w": jnp.ones(())}, batch, microbatches)
        assert float(grads["w"]) == pytest.approx(-0.5, abs=1e-6)
        assert float(metrics["loss"].value()) == pytest.approx(1.25, abs=1e-6)
        assert float(metrics["loss/b"].value()) == pytest.approx(3.5, abs=1e-6)


def test_microbatches_take_every_mth_row():
    """So that a batch whose rows lie in blocks on devices gives every device rows of each microbatch."""
    observed = []

    def loss(params, frozen, batch, rng):
        del frozen, rng
        jax.debug.callback(lambda rows: observed.append(rows.tolist()), batch, ordered=True)
        nll = Mean.of(params["w"] * batch)
        return {"nll": Term(nll.total, nll.weight)}, {}

    gradients(loss, {"w": jnp.ones(())}, {}, jnp.arange(6.0), jax.random.key(0), 3)
    jax.effects_barrier()
    assert sorted(map(tuple, observed)) == sorted([(0.0, 3.0), (1.0, 4.0), (2.0, 5.0)] * (len(observed) // 3))
    with pytest.raises(InputError, match="6 rows does not divide into 4 microbatches"):
        gradients(loss, {"w": jnp.ones(())}, {}, jnp.arange(6.0), jax.random.key(0), 4)


def rows(*extra):
    return token_batch([[5, 6, 7, 8, 9], [10, 11], *extra], length=6, prompt_lengths=[2, 1, *(0 for _ in extra)])


@functools.cache
def sft_gradients():
    model, params = tiny_model()
    loss = make_sft_loss(functools.partial(sequence_logprobs, model))
    return jax.jit(
        lambda batch, microbatches: gradients(loss, params, {}, batch, jax.random.key(0), microbatches),
        static_argnums=1,
    )


def test_rows_without_a_target_add_nothing():
    """All-masked rows, full of padding or of tokens, give finite numbers and the gradient of the others."""
    plain, plain_metrics = sft_gradients()(rows(), 1)
    filled = rows([], [])
    tokens, segments = np.array(filled.tokens), np.array(filled.segment_ids)
    tokens[3], segments[3] = 13, 1  # a row of real tokens that are no targets
    more, metrics = sft_gradients()(filled.replace(tokens=tokens, segment_ids=segments), 2)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(more), strict=True):
        assert np.isfinite(b).all() and np.abs(a).max() > 0
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(a).max())
    assert float(metrics["loss"].value()) == pytest.approx(float(plain_metrics["loss"].value()), rel=1e-5)


def test_a_batch_without_any_target_has_loss_and_gradient_zero():
    batch = rows()
    grads, metrics = sft_gradients()(batch.replace(loss_mask=np.zeros_like(batch.loss_mask)), 1)
    assert float(metrics["loss"].value()) == 0.0
    assert all((np.asarray(leaf) == 0.0).all() for leaf in jax.tree.leaves(grads))


def test_packed_documents_have_the_gradient_of_padded_ones():
    """Both documents in one row: the same targets, and the first token of the second is none."""
    padded, metrics = sft_gradients()(rows(), 1)
    batch = token_batch([[5, 6, 7, 8, 9, 10, 11]], length=8)
    packed = batch.replace(
        positions=np.int32([[0, 1, 2, 3, 4, 0, 1, 0]]),
        segment_ids=np.int32([[1, 1, 1, 1, 1, 2, 2, 0]]),
        loss_mask=np.array([[0, 0, 1, 1, 1, 0, 1, 0]], bool),
    )
    grads, again = sft_gradients()(packed, 1)
    assert float(again["loss"].value()) == pytest.approx(float(metrics["loss"].value()), rel=1e-5)
    for a, b in zip(jax.tree.leaves(padded), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(a).max())


def adam():
    return make_optimizer(OptimizerConfig(learning_rate=0.1), steps=10)


def step_of(loss, optimizer, **options):
    return jax.jit(make_train_step(loss, optimizer, **options))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_number_that_is_not_finite_commits_nothing(bad):
    optimizer = adam()
    step = step_of(weighted_loss, optimizer)
    state = initial_state({"w": jnp.ones(())}, optimizer, jax.random.key(0))
    state, _ = step(state, {}, {"losses": LOSSES, "mask": COUNTED})
    poisoned = {"losses": np.where(LOSSES == 1.0, np.float32(bad), LOSSES), "mask": COUNTED}
    after, metrics = step(state, {}, poisoned)
    assert not np.isfinite(metrics["loss"].value()) and float(metrics["refused"].value()) == 1.0
    for name in ("params", "opt_state"):
        for a, b in zip(jax.tree.leaves(getattr(state, name)), jax.tree.leaves(getattr(after, name)), strict=True):
            np.testing.assert_array_equal(a, b)
    assert (int(state.step), int(after.step)) == (1, 2)
    again, metrics = step(after, {}, {"losses": LOSSES, "mask": COUNTED})
    assert float(metrics["refused"].value()) == 0.0
    assert float(again.params["w"]) < float(after.params["w"])  # and it goes on from there


def test_a_finite_loss_with_an_infinite_gradient_commits_nothing():
    def loss(params, frozen, batch, rng):
        del frozen, batch, rng
        return {"root": Term(jnp.sqrt(params["w"]), jnp.ones(()))}, {}

    optimizer = adam()
    state = initial_state({"w": jnp.zeros(())}, optimizer, jax.random.key(0))
    after, metrics = step_of(loss, optimizer)(state, {}, jnp.zeros((1,)))
    assert float(metrics["loss"].value()) == 0.0 and np.isinf(metrics["grad_norm"].value())
    assert float(after.params["w"]) == 0.0


def test_step_norm_and_frozen_arrays():
    """One Adam step moves by the learning rate; frozen arrays are arguments and get no gradient."""

    def loss(params, frozen, batch, rng):
        del rng
        nll = Mean.of(params["a"] * batch + params["b"] * frozen["factor"] * batch)
        return {"nll": Term(nll.total, nll.weight)}, {}

    optimizer = adam()
    step = step_of(loss, optimizer)
    state = initial_state({"a": jnp.zeros(()), "b": jnp.zeros(())}, optimizer, jax.random.key(0))
    after, metrics = step(state, {"factor": jnp.asarray(-4 / 3)}, jnp.full((2,), 3.0))
    assert float(metrics["grad_norm"].value()) == pytest.approx(5.0)  # (3, -4)
    assert (float(after.params["a"]), float(after.params["b"])) == pytest.approx((-0.1, 0.1), rel=1e-4)
    unchanged, metrics = step(state, {"factor": jnp.zeros(())}, jnp.full((2,), 3.0))
    assert float(unchanged.params["b"]) == 0.0 and float(metrics["grad_norm"].value()) == pytest.approx(3.0)


def test_the_key_of_a_step_is_the_run_key_folded_with_the_step():
    def loss(params, frozen, batch, rng):
        del frozen
        draw = jax.random.uniform(rng)
        return {"nll": Term(params["w"] * batch.sum(), jnp.ones(()))}, {"draw": Mean(draw, jnp.ones(()))}

    optimizer = adam()
    step = step_of(loss, optimizer)
    state = initial_state({"w": jnp.ones(())}, optimizer, jax.random.key(7))
    draws, again = [], []
    for _ in range(3):
        state, metrics = step(state, {}, jnp.ones((2,)))
        draws.append(float(metrics["draw"].value()))
    for count in range(3):
        key = jax.random.split(jax.random.fold_in(jax.random.key(7), count), 1)[0]
        again.append(float(jax.random.uniform(key)))
    assert draws == again and len(set(draws)) == 3
    np.testing.assert_array_equal(jax.random.key_data(state.rng), jax.random.key_data(jax.random.key(7)))


def test_every_microbatch_draws_its_own_numbers():
    """One key for all of them would repeat a mask of dropout in every microbatch."""

    def loss(params, frozen, batch, rng):
        del frozen
        draw = jax.random.uniform(rng)
        return {"nll": Term(params["w"] * batch.sum(), jnp.ones(()))}, {
            "square": Mean(draw**2, jnp.ones(())),
            "draw": Mean(draw, jnp.ones(())),
        }

    _, metrics = gradients(loss, {"w": jnp.ones(())}, {}, jnp.ones((4,)), jax.random.key(0), 4)
    spread = float(metrics["square"].value()) - float(metrics["draw"].value()) ** 2
    assert spread > 1e-3 and float(metrics["draw"].weight) == 4.0


def test_bfloat16_parameters_have_float32_moments():
    model, params = tiny_model(param_dtype="bfloat16", num_layers=1)
    config = OptimizerConfig(learning_rate=0.05, weight_decay=0.1)
    optimizer = make_optimizer(config, steps=4, matrices=model.matrices())
    step = step_of(make_sft_loss(functools.partial(sequence_logprobs, model)), optimizer)
    state = initial_state(params, optimizer, jax.random.key(0))
    types = jax.tree.map(lambda leaf: leaf.dtype, state)
    first, _ = step(state, {}, rows())
    second, metrics = step(first, {}, rows())
    assert jax.tree.map(lambda leaf: leaf.dtype, second) == types and metrics["loss"].total.dtype == jnp.float32
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), second.params, state.params)
    assert moved["embed"]["embedding"] and moved["layers"]["mlp"]["up"]["kernel"]

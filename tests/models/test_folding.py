"""Folded rows give the numbers and gradients of unfolded rows, and rows that do not fit are NaN."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import learn, ops, rollout
from rlhf_jax.algorithms import PPO
from rlhf_jax.algorithms.folds import check_fold, row_fold
from rlhf_jax.algorithms.roles import parameters_by_role
from rlhf_jax.algorithms.scoring import folded as fold_models
from rlhf_jax.algorithms.scoring import score
from rlhf_jax.batches import TokenBatch
from rlhf_jax.data.batch_config import BatchConfig
from rlhf_jax.errors import InputError
from rlhf_jax.models import Fold, Model, Picked, fold_of, sequence_logprobs
from rlhf_jax.models.folding import fold
from rlhf_jax.parallel import ActivationConstraint
from rlhf_jax.testing import IN_MEMORY, completions, mesh_of, prompt_batch, roles_of, setting_of, tiny_model

LENGTHS = (8, 2, 7, 3)


def batch(lengths=LENGTHS, columns=8, seed=0, left_padded=False):
    """Return (tokens, positions, segment ids), padded on the right, or on the left like prompts."""
    rng = np.random.default_rng(seed)
    real = np.arange(columns) < np.array(lengths)[:, None]
    real = real[:, ::-1] if left_padded else real
    tokens = np.where(real, rng.integers(3, 64, real.shape), 0).astype(np.int32)
    return tokens, np.asarray(ops.positions_from_mask(jnp.asarray(real))), real.astype(np.int32)


def columns_of(lengths, rows, columns):
    result = fold_of(np.array(lengths), rows, columns)
    return result and result.columns


def test_width_by_hand() -> None:
    """8 + 2 and 7 + 3 need 10; widths are multiples of 1/16 of the columns (2 of 32 columns)."""
    assert columns_of(LENGTHS, 4, 8) == 10
    assert columns_of(LENGTHS, 2, 8) == 15  # of any two: 8 + 7
    assert columns_of([10, 4, 3, 3], 4, 32) == 14
    assert columns_of([8, 8, 1, 1], 2, 8) is None
    assert columns_of([3, 3, 1, 1], 2, 8) == 6
    assert columns_of([3, 3, 1], 3, 8) is None  # an odd number of rows


def test_targets_by_hand() -> None:
    """At most 6 + 5 tokens of any two rows are predicted, 5.5 per row; columns are multiples of 1/8 of 16."""
    lengths, targets = np.array([9, 9, 9, 9]), np.array([2, 6, 5, 1])
    assert fold_of(lengths, 2, 9, targets, 16) == Fold(None, 6)
    assert fold_of(lengths, 2, 9, np.array([16, 16, 0, 0]), 16) is None
    assert fold_of(np.array([3, 3, 1]), 3, 8, np.array([0, 0, 0]), 8) == Fold(None, 1)
    assert fold_of(np.array([3, 3, 1, 1]), 2, 8, np.array([8, 8, 1, 1]), 8) == Fold(6, None)


@pytest.mark.parametrize("seed", range(5))
def test_any_rows_fit(seed: int) -> None:
    """The bound holds for every choice of half of the rows, in any order."""
    rng = np.random.default_rng(seed)
    lengths, targets = rng.integers(1, 33, 12), rng.integers(0, 17, 12)
    result = fold_of(lengths, 6, 32, targets, 16) or Fold()
    width, count = result.columns or 64, result.targets or 16
    for _ in range(20):
        chosen = rng.permutation(12)[:6]
        tokens, positions, segments = batch(lengths[chosen], 32, seed)
        assert bool(fold(tokens, positions, segments, width, 1)[2].all())
        mask = jnp.asarray(np.arange(16) < targets[chosen][:, None])
        assert Picked.of(mask, count, 1).fits.all()


def test_picked_by_hand() -> None:
    """Two devices with two rows of three columns each: True entries in order, then False ones."""
    mask = jnp.array([[0, 1, 0], [1, 0, 1], [0, 0, 0], [0, 1, 0]], bool)
    picked = Picked.of(mask, 2, 2)
    values = jnp.arange(12.0).reshape(4, 3)
    np.testing.assert_array_equal(picked.valid, [[True, True], [True, False], [True, False], [False, False]])
    gathered = picked.take(values)
    np.testing.assert_array_equal(np.where(picked.valid, gathered, 0), [[1, 3], [5, 0], [10, 0], [0, 0]])
    np.testing.assert_array_equal(picked.put(gathered), jnp.where(mask, values, 0))
    few = Picked.of(mask, 1, 2)  # three of the first device do not fit
    spread = np.asarray(few.put(few.take(values)))
    np.testing.assert_array_equal(np.isnan(spread), [[0, 1, 0], [1, 0, 0], [0, 0, 0], [0, 0, 0]])
    np.testing.assert_array_equal(spread[2:], [[0, 0, 0], [0, 10, 0]])


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("chunk", [2, 64])
def test_log_probabilities_of_targets_alone(parts: int, chunk: int) -> None:
    """Log-probabilities and gradients equal those with logits of every column."""
    model, params = tiny_model(num_layers=1, logits_chunk=chunk)
    tokens, positions, segments = batch((8, 2, 7, 3), seed=1)
    mask = np.zeros((4, 8), bool)
    mask[0, 3:8], mask[1, 1], mask[2, 5:7], mask[3, 2] = True, True, True, True
    if parts == 2:
        model = dataclasses.replace(model, constrain=ActivationConstraint(mesh_of(data=2)))
    rows = TokenBatch(*map(jnp.asarray, (tokens, positions, segments, mask)))
    weights = np.random.default_rng(2).standard_normal((2, 4, 8)).astype(np.float32)

    def total(params, model):
        outputs = sequence_logprobs(model, params, rows)
        return (weights * jnp.stack(outputs)).sum(), outputs

    run = jax.jit(jax.value_and_grad(total, has_aux=True), static_argnums=1)
    (_, alone), expected = run(params, model)
    (_, outputs), grads = run(params, model.folded(Fold(None, 3)))
    for one, other in zip(jax.tree.leaves((outputs, grads)), jax.tree.leaves((alone, expected)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5 * max(1, np.abs(other).max()))
    logprobs, entropy = run(params, model.folded(Fold(None, 2)))[0][1]
    assert np.isnan(logprobs).any() and np.isnan(entropy).any()


def test_folded_columns_by_hand() -> None:
    """Row 0 (8 tokens) is combined with row 1 (2), row 2 (7) with row 3 (3)."""
    tokens, positions, segments = batch()
    (laid, at, apart), place, fits = fold(tokens, positions, segments, 10, 1)
    np.testing.assert_array_equal(laid, [[*tokens[0], *tokens[1, :2]], [*tokens[2, :7], *tokens[3, :3]]])
    np.testing.assert_array_equal(at, [[*range(8), 0, 1], [*range(7), 0, 1, 2]])
    np.testing.assert_array_equal(apart, [[1] * 8 + [9] * 2, [1] * 7 + [9] * 3])
    np.testing.assert_array_equal(place[1], [8, 9] + [20] * 6)
    assert fits.all()


@pytest.mark.parametrize("left_padded", [False, True])
@pytest.mark.parametrize("parts", [1, 2])
def test_hidden_states_and_gradients_are_those_of_the_rows_alone(left_padded: bool, parts: int) -> None:
    model, params = tiny_model(num_layers=2)
    tokens, positions, segments = batch((8, 2, 7, 3, 5, 5, 6, 1), seed=1, left_padded=left_padded)
    if parts == 2:
        model = dataclasses.replace(model, constrain=ActivationConstraint(mesh_of(data=2)))
    weights = np.random.default_rng(2).standard_normal((*tokens.shape, 16)).astype(np.float32)

    def hidden(params, model):
        states = model.hidden(params, tokens, positions=positions, segment_ids=segments)
        states = jnp.where((segments > 0)[..., None], states, 0)
        return (states * weights).sum(), states

    run = jax.jit(jax.value_and_grad(hidden, has_aux=True), static_argnums=1)
    (_, alone), expected = run(params, model)
    (_, states), grads = run(params, model.folded(Fold(12)))
    np.testing.assert_allclose(states, alone, rtol=1e-5, atol=1e-5)
    for one, other in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5 * np.abs(other).max())


def test_rows_that_do_not_fit_are_nan() -> None:
    model, params = tiny_model()
    tokens, positions, segments = batch()
    states = model.folded(Fold(9)).hidden(params, tokens, positions=positions, segment_ids=segments)
    assert np.isnan(states[1]).all() and np.isfinite(states[0]).all()  # 8 + 2 > 9: only the first of the two fits


def test_ppo_scores_and_updates_the_same() -> None:
    policy, params = tiny_model()
    value, value_params = tiny_model("scalar", seed=1)
    owners = {"policy": (policy, params), "value": (value, value_params)}
    roles = roles_of(**owners, reference=owners["policy"], reward=owners["value"])
    prompts = prompt_batch([[3, 4, 5], [6], [7, 8], [9, 10, 11, 12]])
    samples = completions(prompts, [[13, 2], [14, 15, 16, 2], [17], [18, 19]], length=4)
    lengths = np.asarray(samples.prompts.mask.sum(axis=1) + samples.mask.sum(axis=1))
    four = parameters_by_role(roles.trainable, roles.frozen)
    columns = samples.prompts.tokens.shape[1] + samples.tokens.shape[1]
    new = np.asarray(samples.mask.sum(axis=1))
    settings = BatchConfig(4, 4, folded=True)
    plan = row_fold(settings, policy, 1, lengths, columns, new, samples.tokens.shape[1])
    assert plan == Fold(10, 3)  # rows of 5, 5, 3 and 6 tokens: 5 + 5; 9 of them sampled, 2.25 a row
    whole, folded = (
        jax.jit(functools.partial(score, models, temperature=1.0))(four, samples)
        for models in (roles.models, fold_models(roles.models, plan))
    )
    for one, other in zip(jax.tree.leaves(folded), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=2e-5)

    rate = learn.OptimizerConfig(learning_rate=1e-3)
    config = learn.PPOConfig(epochs=2)
    sampling = rollout.SamplingConfig(max_new_tokens=4)
    rates = {"policy_optimizer": rate, "value_optimizer": rate}
    algorithm = PPO(policy=IN_MEMORY, batch=settings, sampling=sampling, ppo=config, **rates)

    def updated(fold):
        job = algorithm.wire(setting_of(mesh_of(), steps=10), roles, {"eos_ids": (2,), "pad_id": 0})
        prepared, metrics = job.prepare(whole, {}, np.ones(4, bool), job.state.kl_coefficient)
        key, measured = jax.random.key(1), metrics
        state, updates = job.update(job.state, roles.frozen, prepared, key, measured, fold=fold)
        return state.train, updates

    (plain, metrics), (other, folded_metrics) = updated(None), updated(plan)
    assert float(metrics["loss"].value()) == pytest.approx(float(folded_metrics["loss"].value()), rel=1e-4)
    for one, two in zip(jax.tree.leaves(plain.params), jax.tree.leaves(other.params), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-3, atol=2e-4)


def test_a_fold_needs_rows_that_divide_over_the_mesh() -> None:
    lengths, model = np.array([1, 1, 1, 1]), tiny_model()[0]
    folded = BatchConfig(4, 8, folded=True)
    assert row_fold(BatchConfig(4, 8), model, 1, lengths, 8) is None
    assert row_fold(folded, model, 1, lengths, 8) == Fold(2)
    assert row_fold(folded, model, 3, lengths, 8) is None
    split = Model(model.config, ActivationConstraint(mesh_of(data=4)))
    assert row_fold(folded, split, 1, lengths, 8) is None
    check_fold(folded, mesh_of(data=2))
    check_fold(BatchConfig(4, 8), mesh_of(sequence=2))
    with pytest.raises(InputError, match="BatchConfig.folded: rows are not folded where MeshConfig.sequence"):
        check_fold(folded, mesh_of(sequence=2))

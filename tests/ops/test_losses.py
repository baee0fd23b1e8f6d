from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.ops import (
    best_of_k_loss,
    binary_label_loss,
    centring_penalty,
    gae,
    kwise_loss,
    magnitude_loss,
    nll_loss,
    normalising_gain_bias,
    pairwise_loss,
    plackett_luce_loss,
    policy_loss,
    rating_loss,
    value_loss,
    whiten,
    zero_outside,
)
from rlhf_jax.types import Mean

NAN = float("nan")
ONE, ZERO = jnp.array(1.0), jnp.array(0.0)


def test_nll_sums_over_the_whole_step_not_over_microbatches():
    # per-token losses [1, 1] and [2, 2, 2, 2]: (2 + 8) / 6 = 1.666667; the mean of the two means would be 1.5
    logprobs = jnp.array([[-1.0, -1.0, NAN, NAN], [-2.0, -2.0, -2.0, -2.0]])
    mask = jnp.array([[True, True, False, False], [True] * 4])
    whole = Mean.of(nll_loss(logprobs, mask), mask)
    parts = [Mean.of(nll_loss(logprobs[i : i + 1], mask[i : i + 1]), mask[i : i + 1]) for i in (0, 1)]
    np.testing.assert_allclose(whole.value(), 10 / 6, rtol=1e-6)
    np.testing.assert_allclose((parts[0] + parts[1]).value(), 10 / 6, rtol=1e-6)


def test_pairwise_numbers():
    # log(1 + exp(-1)) = .313262; with margin .5: log(1 + exp(-.5)) = .474077
    np.testing.assert_allclose(pairwise_loss(ONE, ZERO), 0.313262, atol=1e-6)
    np.testing.assert_allclose(pairwise_loss(ONE, ZERO, 0.5), 0.474077, atol=1e-6)
    np.testing.assert_allclose(pairwise_loss(ONE, ZERO) + 0.01 * centring_penalty(ONE, ZERO), 0.323262, atol=1e-6)
    np.testing.assert_allclose(pairwise_loss(ONE, ONE), np.log(2), rtol=1e-6)


def test_pairwise_is_finite_for_enormous_gaps():
    gaps = jnp.array([-500.0, 500.0])
    np.testing.assert_allclose(pairwise_loss(gaps, jnp.zeros(2)), [500.0, 0.0], atol=1e-6)
    np.testing.assert_allclose(jax.vmap(jax.grad(pairwise_loss))(gaps, jnp.zeros(2)), [-1.0, 0.0], atol=1e-6)


def test_best_of_k():
    rewards = jnp.array([[0.1, 0.4, -0.2, 0.3], [0.0, 0.0, 0.0, 0.0]])
    np.testing.assert_allclose(best_of_k_loss(rewards, jnp.array([1, 3])), [1.161420, np.log(4)], atol=1e-6)


def test_plackett_luce_and_kwise_numbers():
    ranked = jnp.array([1.2, 0.3, -0.5])
    np.testing.assert_allclose(plackett_luce_loss(ranked), 0.834365, atol=1e-6)
    # pairs .341154 + .167786 + .371101 = .880041, a third: .293347
    np.testing.assert_allclose(kwise_loss(ranked), 0.293347, atol=1e-6)


def test_rankings_of_two_equal_the_pairwise_loss():
    pair = jnp.array([[1.0, 0.0], [-0.3, 0.8]])
    expected = pairwise_loss(pair[:, 0], pair[:, 1])
    np.testing.assert_allclose(plackett_luce_loss(pair), expected, rtol=1e-6)
    np.testing.assert_allclose(kwise_loss(pair), expected, rtol=1e-6)


def test_first_factor_of_plackett_luce_is_best_of_k():
    ranked = jnp.array([0.4, 0.3, 0.1, -0.2])
    first = plackett_luce_loss(ranked) - plackett_luce_loss(ranked[1:])
    np.testing.assert_allclose(first, best_of_k_loss(ranked, jnp.array(0)), atol=1e-6)


@pytest.mark.parametrize("loss", [plackett_luce_loss, kwise_loss])
def test_ragged_rankings(loss):
    full = jnp.array([1.2, 0.3, -0.5])
    ragged = jnp.array([[1.2, 0.3, -0.5, NAN], [NAN, NAN, NAN, NAN], [0.7, NAN, NAN, NAN]])
    mask = jnp.array([[1, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]], bool)
    np.testing.assert_allclose(loss(ragged, mask), [loss(full), 0.0, 0.0], atol=1e-6)
    gradient = jax.grad(lambda r: loss(r, mask).sum())(ragged)
    np.testing.assert_allclose(gradient[0, :3], jax.grad(loss)(full), atol=1e-6)
    np.testing.assert_array_equal(np.delete(gradient.ravel(), [0, 1, 2]), 0.0)


def test_plackett_luce_equals_a_float64_loop():
    rewards = np.random.default_rng(0).normal(0, 3, (5, 6))
    expected = [-sum(np.log(np.exp(row[i]) / np.exp(row[i:]).sum()) for i in range(len(row))) for row in rewards]
    np.testing.assert_allclose(plackett_luce_loss(jnp.asarray(rewards, jnp.float32)), expected, rtol=1e-5)


def test_ratings_magnitudes_and_binary_labels():
    assert rating_loss(jnp.array([2.0]), jnp.array([5])).tolist() == [9.0]
    # the second is better by 3 says the label, the model says by 1: (1 - 3)^2 = 4; the other sign would give 16
    assert magnitude_loss(jnp.array(1.0), jnp.array(2.0), jnp.array(3.0)) == 4.0
    # -log sigmoid(1) = .313262, -log sigmoid(-1) = 1.313262
    np.testing.assert_allclose(
        binary_label_loss(jnp.array([1.0, 1.0]), jnp.array([True, False])), [0.313262, 1.313262], atol=1e-6
    )


def test_reward_normalisation():
    gain, bias = normalising_gain_bias(0.3, 2.0)
    np.testing.assert_allclose([gain, bias], [0.5, -0.15], rtol=1e-6)
    rewards = np.random.default_rng(0).normal(3, 5, 1000)
    gain, bias = normalising_gain_bias(rewards.mean(), rewards.std(), target_mean=1.0, target_std=2.0)
    after = gain * rewards + bias
    np.testing.assert_allclose([after.mean(), after.std()], [1.0, 2.0], rtol=1e-5)


NEW, OLD = jnp.array([-1.0, -0.5, -2.0]), jnp.array([-1.3, -0.4, -1.5])
ADVANTAGES = jnp.array([1.0, -0.5, -1.0])


def test_policy_loss_numbers():
    loss, clipped, ratio = policy_loss(NEW, OLD, ADVANTAGES, clip_low=0.2, clip_high=0.2)
    np.testing.assert_allclose(ratio, [1.349859, 0.904837, 0.606531], atol=1e-6)
    # A = 1, r = 1.35: max(-1.35, -1.2) = -1.2; A = -.5, r = .905: .452; A = -1, r = .607: max(.607, .8) = .8
    np.testing.assert_allclose(loss, [-1.2, 0.452419, 0.8], atol=1e-6)
    np.testing.assert_allclose(loss.mean(), 0.017473, atol=1e-6)
    assert clipped.tolist() == [True, False, True]


def test_policy_gradient_is_zero_where_clipped():
    gradient = jax.grad(lambda n: policy_loss(n, OLD, ADVANTAGES, clip_low=0.2, clip_high=0.2)[0].sum())(NEW)
    # unclipped: d(-A r)/d logp = -A r = .5 * .904837
    np.testing.assert_allclose(gradient, [0.0, 0.452419, 0.0], atol=1e-6)


def test_clip_sides_are_separate():
    # ratio 1.25 with A = 1: clipped at 1.2, free at 1.28; ratio .75 with A = -1: clipped at .8 either way
    new, old, advantages = jnp.log(jnp.array([1.25, 0.75])), jnp.zeros(2), jnp.array([1.0, -1.0])
    narrow = policy_loss(new, old, advantages, clip_low=0.2, clip_high=0.2)
    higher = policy_loss(new, old, advantages, clip_low=0.2, clip_high=0.28)
    np.testing.assert_allclose(narrow[0], [-1.2, 0.8], atol=1e-6)
    np.testing.assert_allclose(higher[0], [-1.25, 0.8], atol=1e-6)
    assert higher[1].tolist() == [False, True]
    # a bound of 0 is a bound: with clip_low 0 the second is max(.75, 1) = 1
    np.testing.assert_allclose(policy_loss(new, old, advantages, clip_low=0.0, clip_high=0.2)[0][1], 1.0, atol=1e-6)


def test_dual_clip():
    new, old = jnp.log(jnp.array([5.0, 5.0])), jnp.zeros(2)
    advantages = jnp.array([-1.0, 1.0])
    free, _, _ = policy_loss(new, old, advantages, clip_low=0.2, clip_high=0.2)
    bounded, _, _ = policy_loss(new, old, advantages, clip_low=0.2, clip_high=0.2, dual_clip=3.0)
    np.testing.assert_allclose(free, [5.0, -1.2], rtol=1e-6)
    np.testing.assert_allclose(bounded, [3.0, -1.2], rtol=1e-6)


def test_first_step_identities():
    """Before the first optimiser step: ratio 1, nothing clipped, loss -mean(A) = 0, gradient -A (not -A/2)."""
    logprobs = jnp.asarray(np.random.default_rng(0).normal(-2, 1, (4, 6)), jnp.float32)
    mask = jnp.arange(6)[None, :] < jnp.array([[6], [3], [5], [1]])
    advantages = whiten(jnp.asarray(np.random.default_rng(1).normal(size=(4, 6)), jnp.float32), mask)
    loss, clipped, ratio = policy_loss(logprobs, logprobs, advantages, clip_low=0.2, clip_high=0.2)
    assert (ratio == 1.0).all()
    assert not clipped.any()
    np.testing.assert_allclose(Mean.of(loss, mask).value(), 0.0, atol=1e-6)
    gradient = jax.grad(lambda n: policy_loss(n, logprobs, advantages, clip_low=0.2, clip_high=0.2)[0].sum())(logprobs)
    np.testing.assert_allclose(gradient, -advantages, atol=1e-7)


def test_extreme_ratios_have_finite_losses_and_gradients():
    new, old = jnp.array([500.0, 500.0, -500.0]), jnp.zeros(3)
    advantages = jnp.array([1.0, 0.0, -1.0])

    def total(new):
        return policy_loss(new, old, advantages, clip_low=0.2, clip_high=0.2)[0].sum()

    value, gradient = jax.value_and_grad(total)(new)
    np.testing.assert_allclose(value, -1.2 + 0.0 + 0.8, atol=1e-6)
    assert np.isfinite(gradient).all()


def test_a_large_ratio_is_not_cut_short():
    """The clamp that keeps exp finite is far out: a log ratio of 10 with A = -1 costs e^10 = 22026.5, gradient the same."""

    def total(new):
        return policy_loss(new, jnp.zeros(1), jnp.array([-1.0]), clip_low=0.2, clip_high=0.2)[0].sum()

    value, gradient = jax.value_and_grad(total)(jnp.array([10.0]))
    np.testing.assert_allclose([value, gradient[0]], [22026.466, 22026.466], rtol=1e-5)


def test_old_quantities_are_constants():
    def policy(old, advantages):
        return policy_loss(NEW, old, advantages, clip_low=0.2, clip_high=0.2)[0].sum()

    def value(old, returns):
        return value_loss(NEW, old, returns, 0.2)[0].sum()

    for function in (policy, value):
        for gradient in jax.grad(function, argnums=(0, 1))(OLD, ADVANTAGES):
            assert (gradient == 0.0).all()


def test_value_loss_numbers():
    values, old, returns = jnp.array([1.0, 0.0]), jnp.array([0.5, 0.1]), jnp.array([0.2, 1.0])
    loss, clipped = value_loss(values, old, returns, 0.2)
    # V clipped to [.7, 0]: squares max((.8)^2, (.5)^2) = .64 and max(1, 1) = 1, halved
    np.testing.assert_allclose(loss, [0.32, 0.5], atol=1e-6)
    np.testing.assert_allclose(loss.mean(), 0.41, atol=1e-6)
    assert clipped.tolist() == [False, False]


def test_value_loss_clipped_and_unclipped():
    # V = 1, V_old = 0, R = 1, clip .2: free 0, clipped (.2 - 1)^2 = .64 -> .32 and no gradient
    args = (jnp.array([0.0]), jnp.array([1.0]))
    loss, clipped = value_loss(jnp.array([1.0]), *args, 0.2)
    np.testing.assert_allclose(loss, [0.32], atol=1e-6)
    assert clipped.tolist() == [True]
    assert jax.grad(lambda v: value_loss(v, *args, 0.2)[0].sum())(jnp.array([1.0])) == 0.0
    loss, clipped = value_loss(jnp.array([3.0]), *args, None)
    assert (loss.tolist(), clipped.tolist()) == ([2.0], [False])


def test_zero_value_head_starts_at_half_the_mean_squared_return():
    rewards, mask = jnp.array([[1.0, 2.0, 4.0]]), jnp.ones((1, 3), bool)
    zeros = jnp.zeros((1, 3))
    _, returns = gae(rewards, zeros, mask, discount=1.0, lam=1.0)
    loss, _ = value_loss(zeros, zeros, returns, 0.2)
    # returns 7, 6, 4: .5 (49 + 36 + 16) / 3
    np.testing.assert_allclose(loss.mean(), 0.5 * 101 / 3, rtol=1e-6)


def test_nan_in_padding_reaches_neither_loss_nor_gradient():
    mask = jnp.array([True, True, False])
    dirty = NEW.at[2].set(NAN)

    def total(new):
        new = zero_outside(new, mask)
        policy, _, _ = policy_loss(new, zero_outside(OLD, mask), ADVANTAGES, clip_low=0.2, clip_high=0.2)
        value, _ = value_loss(new, zero_outside(OLD, mask), ADVANTAGES, 0.2)
        return Mean.of(policy, mask).value() + Mean.of(value, mask).value() + nll_loss(new, mask).sum()

    value, gradient = jax.value_and_grad(total)(dirty)
    expected, expected_gradient = jax.value_and_grad(total)(NEW)
    assert value == expected
    np.testing.assert_array_equal(gradient, expected_gradient)
    assert np.isfinite(gradient).all()
    assert gradient[2] == 0.0


def test_losses_are_float32_from_bfloat16():
    half = jnp.array([0.5], jnp.bfloat16)
    outputs = [pairwise_loss(half, half), rating_loss(half, half), nll_loss(half, jnp.array([True]))]
    outputs += [policy_loss(half, half, half, clip_low=0.2, clip_high=0.2)[0], value_loss(half, half, half, 0.2)[0]]
    assert {x.dtype for x in outputs} == {jnp.dtype(jnp.float32)}

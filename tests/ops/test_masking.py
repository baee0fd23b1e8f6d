from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.ops import (
    end_mask,
    last_true_index,
    masked_mean,
    masked_sum,
    masked_var,
    positions_from_mask,
    whiten,
    zero_outside,
)

NAN = float("nan")
FOUR = jnp.array([1.0, 2.0, 3.0, 4.0, 99.0])
FOUR_MASK = jnp.array([True, True, True, True, False])
# Rewards of the worked case in "The N implementation details of RLHF with PPO" (Huang et al. 2023).
BLOG = jnp.array([[1.2, 1.3, 1.4], [1.5, 1.6, 1.7], [1.8, 1.9, 2.0]])


def test_sum_mean_var_over_the_mask_only():
    assert masked_sum(FOUR, FOUR_MASK) == 10.0
    assert masked_mean(FOUR, FOUR_MASK) == 2.5
    # squared distances from 2.5: 2.25 + .25 + .25 + 2.25 = 5
    assert masked_var(FOUR, FOUR_MASK) == 1.25
    np.testing.assert_allclose(masked_var(FOUR, FOUR_MASK, ddof=1), 5 / 3, rtol=1e-6)


@pytest.mark.parametrize("axis", [None, 0, 1, -1, (0, 1)])
@pytest.mark.parametrize("ddof", [0, 1])
def test_statistics_along_axes_equal_a_float64_reference(axis, ddof):
    rng = np.random.default_rng(0)
    x = rng.normal(3.0, 2.0, (5, 7))
    mask = rng.random((5, 7)) < 0.6
    mask[0], mask[:, 0] = True, True
    counted = np.ma.masked_array(x, ~mask)
    jx, jm = jnp.asarray(np.where(mask, x, NAN), jnp.float32), jnp.asarray(mask)
    np.testing.assert_allclose(masked_sum(jx, jm, axis), np.asarray(counted.sum(axis)), rtol=1e-5)
    np.testing.assert_allclose(masked_mean(jx, jm, axis), np.asarray(counted.mean(axis)), rtol=1e-5)
    np.testing.assert_allclose(masked_var(jx, jm, axis, ddof), np.asarray(counted.var(axis, ddof=ddof)), rtol=1e-4)


def test_variance_does_not_cancel():
    # values 1000 + {0, .01}: variance 2.5e-5; E[x^2] - E[x]^2 in float32 has a resolution of about .06 here
    x = jnp.asarray(1000.0 + 0.01 * (np.arange(64) % 2), jnp.float32)
    exact = np.asarray(x, np.float64).var()
    np.testing.assert_allclose(masked_var(x, jnp.ones(64, bool)), exact, rtol=1e-3)


def test_one_token_and_empty_masks_are_finite():
    one = jnp.array([False, True, False])
    none = jnp.zeros(3, bool)
    x = jnp.array([NAN, 7.0, NAN])
    assert masked_var(x, one, ddof=1) == 0.0
    assert masked_mean(x, none) == 0.0
    np.testing.assert_array_equal(whiten(x, one, ddof=1), [0.0, 0.0, 0.0])
    np.testing.assert_array_equal(whiten(x, one, shift_mean=False), [0.0, 7.0, 0.0])
    np.testing.assert_array_equal(whiten(x, none), [0.0, 0.0, 0.0])


def test_whiten_masked_hand_numbers():
    # biased: (1 - 2.5) / sqrt(1.25) = -1.341641; unbiased: -1.5 / sqrt(5/3) = -1.161895; counting 99 too: -.538679
    np.testing.assert_allclose(whiten(FOUR, FOUR_MASK), [-1.341641, -0.447214, 0.447214, 1.341641, 0.0], atol=1e-5)
    np.testing.assert_allclose(
        whiten(FOUR, FOUR_MASK, ddof=1), [-1.161895, -0.387298, 0.387298, 1.161895, 0.0], atol=1e-5
    )


def test_whiten_keeping_the_mean_blog_case():
    everywhere = jnp.ones((3, 3), bool)
    biased = [[0.0508, 0.4381, 0.8254], [1.2127, 1.6, 1.9873], [2.3746, 2.7619, 3.1492]]
    unbiased = [[0.1394, 0.5046, 0.8697], [1.2349, 1.6, 1.9651], [2.3303, 2.6954, 3.0606]]
    np.testing.assert_allclose(whiten(BLOG, everywhere, shift_mean=False), biased, atol=1e-4)
    np.testing.assert_allclose(whiten(BLOG, everywhere, ddof=1, shift_mean=False), unbiased, atol=1e-4)


def test_whitening_adds_epsilon_to_the_variance():
    """[0, 2e-4]: variance 1e-8, as large as epsilon, so the result is 1 / sqrt(2) and not 1: a tiny spread is not blown up."""
    np.testing.assert_allclose(whiten(jnp.array([0.0, 2e-4]), jnp.ones(2, bool)), [-0.7071068, 0.7071068], rtol=1e-5)


def test_whitening_equal_values_gives_zero():
    # .7 is not a float32, nor is the mean of 1000 of them: the residue would be multiplied by 1/sqrt(1e-8) = 10^4
    whitened = whiten(jnp.full((1000,), 0.7), jnp.ones(1000, bool))
    assert jnp.abs(whitened).max() < 1e-5


def test_whiten_ignores_nan_outside_in_values_and_gradients():
    x = FOUR.at[4].set(NAN)

    def total(x):
        return (whiten(x, FOUR_MASK) * jnp.arange(5.0)).sum()

    np.testing.assert_allclose(whiten(x, FOUR_MASK), whiten(FOUR, FOUR_MASK))
    gradient = jax.grad(total)(x)
    assert np.isfinite(gradient).all()
    assert gradient[4] == 0.0


def test_zero_outside_stops_values_and_gradients():
    x = jnp.array([1.0, NAN])
    mask = jnp.array([True, False])
    assert zero_outside(x, mask).tolist() == [1.0, 0.0]
    assert jax.grad(lambda x: jnp.exp(zero_outside(x, mask)).sum())(x).tolist() == [np.float32(np.e), 0.0]


def test_whiten_returns_float32_from_integers_and_bfloat16():
    assert whiten(jnp.array([1, 2, 3]), jnp.ones(3, bool)).dtype == jnp.float32
    assert masked_mean(jnp.full((512,), 1.0, jnp.bfloat16), jnp.ones(512, bool)) == 1.0


def test_end_mask_keeps_the_first_end_token():
    # the docstring example of verl's get_response_mask
    tokens = jnp.array([[20, 10, 34, 1, 0, 0, 0], [78, 0, 76, 2, 1, 0, 0]])
    first = [1, 1, 1, 1, 0, 0, 0]
    assert end_mask(tokens, 1).astype(int).tolist() == [first, [1, 1, 1, 1, 1, 0, 0]]
    assert end_mask(tokens, [1]).astype(int).tolist() == [first, [1, 1, 1, 1, 1, 0, 0]]
    assert end_mask(tokens, (1, 2)).astype(int).tolist() == [first, first]


def test_end_mask_with_pad_as_end_and_without_an_end():
    assert end_mask(jnp.array([[7, 2, 2, 2]]), 2).tolist() == [[True, True, False, False]]
    assert end_mask(jnp.array([[7, 8, 9]]), 2).tolist() == [[True, True, True]]
    assert end_mask(jnp.array([[2, 8, 9]]), 2).tolist() == [[True, False, False]]


def test_positions_count_real_tokens_before():
    # Huang et al. 2023: query [23073, pad, pad] + 3 response tokens
    mask = jnp.array([[1, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1]], bool)
    positions = positions_from_mask(mask)
    assert positions.tolist() == [[0, 1, 1, 1, 2, 3], [0, 0, 0, 1, 2, 3]]
    assert positions.dtype == jnp.int32


def test_last_true_index():
    mask = jnp.array([[1, 1, 0], [1, 0, 1], [0, 0, 0], [1, 1, 1]], bool)
    assert last_true_index(mask).tolist() == [1, 2, -1, 2]

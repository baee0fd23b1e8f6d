"""Importance weights: worked numbers, what clamping and masks do, and that they are constants."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.ops import bounded_importance, importance_weights

POLICY, SAMPLED = jnp.array([[-1.0, -2.0, -0.3]]), jnp.array([[-1.1, -3.0, -0.25]])
ALL = jnp.ones((1, 3), jnp.bool_)


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        ("token", [1.105171, 2.718282, 0.951229]),  # exp of .1, 1, -.05
        ("sequence", [2.857651] * 3),  # exp(1.05)
        ("geometric", [1.419068] * 3),  # exp(1.05 / 3)
    ],
)
def test_worked_example(unit, expected):
    np.testing.assert_allclose(importance_weights(POLICY, SAMPLED, ALL, unit)[0], expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("low", "high", "outside", "expected"),
    [
        (0.0, 2.0, "clip", [1.105171, 2.0, 0.951229]),
        (0.0, 2.0, "drop", [1.105171, 0.0, 0.951229]),
        (1.0, 5.0, "clip", [1.105171, 2.718282, 1.0]),
        (1.0, 5.0, "drop", [1.105171, 2.718282, 0.0]),
    ],
)
def test_bounds(low, high, outside, expected):
    weights = importance_weights(POLICY, SAMPLED, ALL)
    np.testing.assert_allclose(bounded_importance(weights, low, high, outside)[0], expected, rtol=1e-6)


@pytest.mark.parametrize("unit", ["token", "sequence", "geometric"])
def test_what_lies_outside_the_mask_changes_nothing(unit):
    """The last column is garbage: NaN and infinity. Of a row without tokens everything is 0."""
    mask = jnp.array([[True, True, False], [False, False, False]])
    policy = jnp.array([[-1.0, -2.0, jnp.nan], [jnp.nan] * 3])
    sampled = jnp.array([[-1.1, -3.0, -jnp.inf], [0.0] * 3])
    actual = importance_weights(policy, sampled, mask, unit)
    alone = importance_weights(policy[:1, :2], sampled[:1, :2], mask[:1, :2], unit)
    np.testing.assert_array_equal(actual, jnp.concatenate([jnp.pad(alone, ((0, 0), (0, 1))), jnp.zeros((1, 3))]))


def test_logs_are_clamped_also_their_sums():
    """40 tokens of log ratio 1 would be e^40 as a sequence; e^20 is what is left. -1e30: a forbidden token, e^-20."""
    policy, none = jnp.zeros((1, 40)), jnp.ones((1, 40), jnp.bool_)
    np.testing.assert_allclose(
        importance_weights(policy, policy - 1.0, none, "sequence")[0, 0], np.exp(20.0), rtol=1e-5
    )
    np.testing.assert_allclose(importance_weights(policy - 1e30, policy, none)[0, 0], np.exp(-20.0), rtol=1e-5)


@pytest.mark.parametrize("unit", ["token", "sequence", "geometric"])
def test_no_gradient_passes(unit):
    grads = jax.grad(lambda p, s: importance_weights(p, s, ALL, unit).sum(), argnums=(0, 1))(POLICY, SAMPLED)
    for value in grads:
        np.testing.assert_array_equal(value, jnp.zeros((1, 3)))


def test_unknown_kinds_are_refused():
    with pytest.raises(InputError, match="importance unit='word': use one of 'token'"):
        importance_weights(POLICY, SAMPLED, ALL, "word")
    with pytest.raises(InputError, match="importance outside='keep': use 'clip' or 'drop'"):
        bounded_importance(POLICY, 0.0, 2.0, "keep")

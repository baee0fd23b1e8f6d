from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.ops import adaptive_kl_coefficient, kl_estimate, kl_term

POLICY, REFERENCE = jnp.array([0.7, 0.3]), jnp.array([0.5, 0.5])


@pytest.mark.parametrize(
    ("d", "expected"),
    [(0.5, {"k1": 0.5, "k2": 0.125, "k3": 0.106531}), (-0.5, {"k1": -0.5, "k2": 0.125, "k3": 0.148721})],
)
def test_single_sample(d, expected):
    # k3: exp(-.5) - 1 + .5 = .106531, exp(.5) - 1 - .5 = .148721
    for kind, value in expected.items():
        np.testing.assert_allclose(kl_estimate(jnp.array(d - 2.0), jnp.array(-2.0), kind), value, atol=1e-6)


def test_expectations_on_two_arms():
    # KL = .7 ln 1.4 + .3 ln .6 = .0822829
    logp, ref = jnp.log(POLICY), jnp.log(REFERENCE)
    expected = {"k1": 0.0822829, "k2": 0.0787662, "k3": 0.0822829}
    for kind, value in expected.items():
        np.testing.assert_allclose((POLICY * kl_estimate(logp, ref, kind)).sum(), value, atol=1e-6)


@pytest.mark.parametrize(("kind", "expected"), [("k1", [0.0, 0.0]), ("k2", [0.177933, -0.177933]), ("k3", [0.2, -0.2])])
def test_expected_gradients_on_two_arms(kind, expected):
    """Samples fixed (weights are constants), gradient in the logits: what a KL term in the loss really does."""

    def term(logits):
        return (POLICY * kl_estimate(jax.nn.log_softmax(logits), jnp.log(REFERENCE), kind)).sum()

    np.testing.assert_allclose(jax.grad(term)(jnp.log(POLICY)), expected, atol=1e-6)


def test_weighted_k3_by_hand():
    """d = .5: k3 .106531; the policy moved by .2 since it sampled: e^.2 = 1.221403; product .130117."""
    actual = kl_term(jnp.array(-1.0), jnp.array(-1.2), jnp.array(-1.5), "weighted_k3")
    np.testing.assert_allclose(actual, 0.130117, atol=1e-6)
    for kind in ("k1", "k2", "k3"):
        np.testing.assert_allclose(
            kl_term(jnp.array(-1.0), jnp.array(-1.2), jnp.array(-1.5), kind),
            kl_estimate(jnp.array(-1.0), jnp.array(-1.5), kind),
        )
    with pytest.raises(InputError, match="'k3\\+'"):
        kl_term(jnp.zeros(1), jnp.zeros(1), jnp.zeros(1), "k3+")


def test_k2_has_the_true_gradient():
    def true_kl(logits):
        logp = jax.nn.log_softmax(logits)
        return (jnp.exp(logp) * (logp - jnp.log(REFERENCE))).sum()

    np.testing.assert_allclose(jax.grad(true_kl)(jnp.log(POLICY)), [0.177933, -0.177933], atol=1e-6)


def test_equal_distributions_have_kl_exactly_zero():
    logp = jnp.asarray(np.random.default_rng(0).normal(-3, 1, (4, 5)), jnp.float32)
    for kind in ("k1", "k2", "k3"):
        assert (kl_estimate(logp, logp, kind) == 0.0).all()


def test_approximate_kl_of_an_update():
    # samples of the OLD policy, so it comes first
    new, old = jnp.array([-1.0, -0.5, -2.0]), jnp.array([-1.3, -0.4, -1.5])
    for kind, value in {"k1": 0.1, "k2": 0.0583333, "k3": 0.0537423}.items():
        np.testing.assert_allclose(kl_estimate(old, new, kind).mean(), value, atol=1e-6)


def test_k3_is_never_negative_for_tiny_differences():
    d = jnp.asarray(np.random.default_rng(0).normal(0, 1e-4, 1000), jnp.float32)
    k3 = kl_estimate(d, jnp.zeros(1000), "k3")
    exact = np.expm1(-np.asarray(d, np.float64)) + np.asarray(d, np.float64)
    assert (k3 >= 0).all()
    np.testing.assert_allclose(k3, exact, atol=1e-10)  # exp(-d) - 1 + d in float32 is off by 6e-8


def test_kl_is_float32_from_bfloat16():
    """The difference is taken in float32: -100 - (-.30078125) is -99.69921875; bfloat16 would make it -99.5."""
    d = kl_estimate(jnp.array([-100.0], jnp.bfloat16), jnp.array([-0.30078125], jnp.bfloat16))
    assert d.dtype == jnp.float32 and float(d[0]) == -99.69921875


def test_unknown_kind():
    with pytest.raises(InputError, match="'k4'"):
        kl_estimate(jnp.zeros(1), jnp.zeros(1), "k4")


@pytest.mark.parametrize(("kl", "expected"), [(0.0, 0.148464), (12.0, 0.151536), (6.6, 0.150768), (6.0, 0.15)])
def test_adaptive_coefficient(kl, expected):
    # kl 0: error -1 clipped to -.2, .15 * (1 - .2 * 512 / 10000) = .148464; kl 6.6: .15 * (1 + .1 * .0512) = .150768
    actual = adaptive_kl_coefficient(0.15, kl, episodes=512, target=6.0, horizon=1e4)
    np.testing.assert_allclose(actual, expected, atol=5e-7)
    assert actual.dtype == jnp.float32


def test_adaptive_coefficient_under_jit_and_bad_settings():
    step = jax.jit(lambda beta, kl: adaptive_kl_coefficient(beta, kl, episodes=512, target=6.0, horizon=1e4))
    np.testing.assert_allclose(step(jnp.float32(0.15), jnp.float32(0.0)), 0.148464, atol=5e-7)
    with pytest.raises(InputError, match="target=0"):
        adaptive_kl_coefficient(0.15, 1.0, episodes=512, target=0, horizon=1e4)

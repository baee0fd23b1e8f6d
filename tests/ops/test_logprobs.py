from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from rlhf_jax.errors import InputError
from rlhf_jax.ops import entropy_from_logits, hidden_logprobs, logprobs_and_entropy, token_logprobs, zero_outside

NAN = float("nan")


def reference(logits, targets, temperature):
    """Float64, one position at a time, by the definition of softmax."""
    logits = np.asarray(logits, np.float64) / temperature
    logprobs, entropies = np.zeros(targets.shape), np.zeros(targets.shape)
    for index in np.ndindex(targets.shape):
        weights = np.exp(logits[index] - logits[index].max())
        probabilities = weights / weights.sum()
        logprobs[index] = np.log(probabilities[targets[index]])
        entropies[index] = -sum(p * np.log(p) for p in probabilities if p > 0)
    return logprobs, entropies


def random_case(seed=0, batch=2, length=7, width=5, vocabulary=11):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(batch, length, width)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(width, vocabulary)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, vocabulary, (batch, length)), jnp.int32)
    return hidden, kernel, targets


def test_temperature_divides_logits():
    logits = jnp.array([[2.0, 1.0, 0.0]] * 3)
    actual = token_logprobs(logits, jnp.arange(3), 0.7)
    # dividing log-probabilities instead would give [-.582294, -2.010866, -3.439437]
    np.testing.assert_allclose(actual, [-0.260118, -1.688690, -3.117261], atol=2e-6)
    np.testing.assert_allclose(jnp.exp(actual).sum(), 1.0, rtol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
def test_logprobs_and_entropy_equal_float64(temperature):
    rng = np.random.default_rng(1)
    logits = jnp.asarray(rng.normal(0, 20, (3, 4, 50)), jnp.float32)
    targets = rng.integers(0, 50, (3, 4))
    logprobs, entropies = reference(logits, targets, temperature)
    np.testing.assert_allclose(token_logprobs(logits, targets, temperature), logprobs, atol=2e-5)
    np.testing.assert_allclose(entropy_from_logits(logits, temperature), entropies, atol=2e-5)


def test_bfloat16_logits_are_worked_on_in_float32():
    logits = jnp.asarray(np.random.default_rng(2).normal(0, 3, (1, 1000)), jnp.bfloat16)
    target = np.array([17])
    exact = reference(np.asarray(logits, np.float64), target, 0.7)[0]
    actual = token_logprobs(logits, jnp.asarray(target), 0.7)
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, exact, atol=1e-5)


def test_impossible_tokens_change_neither_entropy_nor_gradients():
    logits = jnp.array([0.3, -1.0, 2.0])
    padded = jnp.concatenate([logits, jnp.full((2,), -jnp.inf)])
    np.testing.assert_allclose(entropy_from_logits(padded), entropy_from_logits(logits), rtol=1e-6)
    np.testing.assert_allclose(token_logprobs(padded, jnp.array(1)), token_logprobs(logits, jnp.array(1)), rtol=1e-6)
    gradient = jax.grad(lambda x: entropy_from_logits(x) + token_logprobs(x, jnp.array(1)))(padded)
    assert np.isfinite(gradient).all()
    assert gradient[3:].tolist() == [0.0, 0.0]


def test_entropy_of_known_distributions():
    np.testing.assert_allclose(entropy_from_logits(jnp.zeros(8)), np.log(8), rtol=1e-6)
    # p = [.7, .3]: -.7 ln .7 - .3 ln .3 = .6108643
    np.testing.assert_allclose(entropy_from_logits(jnp.log(jnp.array([0.7, 0.3]))), 0.6108643, rtol=1e-6)


def test_entropy_gradient_is_the_analytic_one():
    # dH/dl_i = -p_i (log p_i + H)
    logits = jnp.array([0.5, -0.2, 1.3])
    p = np.exp(np.asarray(jax.nn.log_softmax(logits), np.float64))
    expected = -p * (np.log(p) - (p * np.log(p)).sum())
    np.testing.assert_allclose(jax.grad(entropy_from_logits)(logits), expected, atol=1e-6)


def test_one_pass_equals_float64_with_its_gradient():
    rng = np.random.default_rng(4)
    logits = 60.0 + rng.normal(0, 5, (6, 40))  # an offset that a naive sum would pay for in digits
    logits[2, 5:] = -np.inf
    targets, g, h = rng.integers(0, 5, 6), rng.normal(size=6), rng.normal(size=6)
    remaining = np.asarray(logits, np.float32)
    logprobs, entropies = reference(remaining, targets, 1.0)

    actual, pull = jax.vjp(lambda x: logprobs_and_entropy(x, jnp.asarray(targets)), jnp.asarray(remaining))
    np.testing.assert_allclose(actual[0], logprobs, atol=1e-5)
    np.testing.assert_allclose(actual[1], entropies, atol=1e-5)

    # d logprob / d l_i = [i is the target] - p_i;  d H / d l_i = -p_i (log p_i + H)
    weights = np.exp(np.asarray(remaining, np.float64) - 60.0)
    p = weights / weights.sum(axis=-1, keepdims=True)
    onehot = np.arange(40) == targets[:, None]
    plogp = np.where(p > 0, p * np.log(np.where(p > 0, p, 1.0)), 0.0)
    expected = g[:, None] * (onehot - p) - h[:, None] * (plogp + p * entropies[:, None])
    (gradient,) = pull((jnp.asarray(g, jnp.float32), jnp.asarray(h, jnp.float32)))
    np.testing.assert_allclose(gradient, expected, atol=1e-5)
    assert not np.asarray(gradient)[2, 5:].any()


@pytest.mark.parametrize("factor", [0.5, 3.0, -1e6])
def test_an_impossible_token_has_gradient_zero_whatever_comes_in(factor):
    """The gradient of 3 H is 3 times that of H: a stand-in for -inf must not overflow when it is multiplied."""
    logits = jnp.array([0.3, -1.0, 2.0, -jnp.inf])

    def scaled(factor, logits):
        return factor * logprobs_and_entropy(logits, jnp.array(1))[1]

    gradient = jax.grad(scaled, argnums=1)(factor, logits)
    np.testing.assert_allclose(gradient[:3], factor * jax.grad(entropy_from_logits)(logits[:3]), rtol=1e-5)
    assert gradient[3] == 0.0


def test_temperature_zero_is_refused():
    with pytest.raises(InputError, match="temperature=0"):
        token_logprobs(jnp.zeros((1, 3)), jnp.array([0]), 0)


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 7, 100])
def test_hidden_logprobs_equal_direct_with_gradients(chunk_size):
    hidden, kernel, targets = random_case()
    weights = jnp.asarray(np.random.default_rng(3).normal(size=(2, *targets.shape)), jnp.float32)

    def direct(hidden, kernel):
        logits = hidden @ kernel
        return token_logprobs(logits, targets, 0.7), entropy_from_logits(logits, 0.7)

    def chunked(hidden, kernel):
        return hidden_logprobs(hidden, lambda h: h @ kernel, targets, temperature=0.7, chunk_size=chunk_size)

    def scalar(function):
        def total(hidden, kernel):
            logprobs, entropy = function(hidden, kernel)
            return (weights[0] * logprobs + weights[1] * entropy).sum()

        return jax.jit(jax.grad(total, argnums=(0, 1)))

    expected, actual = direct(hidden, kernel), jax.jit(chunked)(hidden, kernel)
    logits = np.asarray(hidden, np.float64) @ np.asarray(kernel, np.float64)
    for own, other, slow in zip(actual, expected, reference(logits, np.asarray(targets), 0.7), strict=True):
        np.testing.assert_allclose(own, other, atol=1e-5)
        np.testing.assert_allclose(own, slow, atol=1e-5)
    for own, other in zip(scalar(chunked)(hidden, kernel), scalar(direct)(hidden, kernel), strict=True):
        np.testing.assert_allclose(own, other, atol=1e-5)


def all_sizes(jaxpr):
    """Sizes of every intermediate of a jaxpr, the inner ones included."""
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            yield variable.aval.size
        for parameter in equation.params.values():
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from all_sizes(inner)


def test_full_logits_never_exist_forward_or_backward():
    hidden, kernel, targets = random_case(batch=2, length=64, width=4, vocabulary=500)
    full = 2 * 64 * 500

    def chunked(hidden, kernel):
        logprobs, entropy = hidden_logprobs(hidden, lambda h: h @ kernel, targets, chunk_size=8)
        return (logprobs + 0.1 * entropy).sum()

    def direct(hidden, kernel):
        return (token_logprobs(hidden @ kernel, targets)).sum()

    def largest(f):
        return max(all_sizes(jax.make_jaxpr(jax.value_and_grad(f, argnums=(0, 1)))(hidden, kernel).jaxpr))

    assert largest(direct) >= full  # the walk does see them when they are there
    assert largest(chunked) <= 2 * 8 * 500


def test_chunking_leaves_a_sharded_batch_where_it_is():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    rows, everywhere = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    hidden, kernel, targets = random_case(batch=8)

    def chunked(hidden, kernel, targets):
        return hidden_logprobs(hidden, lambda h: h @ kernel, targets, chunk_size=3)

    global_arrays = (jax.device_put(hidden, rows), jax.device_put(kernel, everywhere), jax.device_put(targets, rows))
    compiled = jax.jit(chunked).lower(*global_arrays).compile()
    assert not re.findall(r"all-gather|all-to-all|collective-permute", compiled.as_text())
    for actual, single in zip(compiled(*global_arrays), chunked(hidden, kernel, targets), strict=True):
        assert actual.sharding.is_equivalent_to(rows, 2)
        np.testing.assert_allclose(actual, single, atol=1e-6)


def test_masked_hidden_garbage_reaches_nothing():
    hidden, kernel, targets = random_case()
    mask = jnp.arange(7)[None, :] < jnp.array([[7], [4]])
    dirty = jnp.where(mask[..., None], hidden, NAN)

    def total(hidden, kernel):
        logprobs, entropy = hidden_logprobs(hidden, lambda h: h @ kernel, targets, chunk_size=3, mask=mask)
        return (logprobs + entropy).sum()

    def clean(hidden, kernel):
        logits = hidden @ kernel
        pair = token_logprobs(logits, targets) + entropy_from_logits(logits)
        return zero_outside(pair, mask).sum()

    value, gradients = jax.value_and_grad(total, argnums=(0, 1))(dirty, kernel)
    expected, expected_gradients = jax.value_and_grad(clean, argnums=(0, 1))(hidden, kernel)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for actual, other in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(actual, other, atol=1e-5)


def test_hidden_logprobs_stay_bfloat16_until_the_unembedding():
    hidden, kernel, targets = random_case()
    observed = []

    def unembed(h):
        observed.append(h.dtype)
        return jnp.einsum("bcd,dv->bcv", h, kernel.astype(h.dtype), preferred_element_type=jnp.float32)

    logprobs, entropy = hidden_logprobs(hidden.astype(jnp.bfloat16), unembed, targets, chunk_size=4)
    assert set(observed) == {jnp.dtype(jnp.bfloat16)}
    assert logprobs.dtype == entropy.dtype == jnp.float32


def test_chunk_size_zero_is_refused():
    hidden, kernel, targets = random_case()
    with pytest.raises(InputError, match="chunk_size=0"):
        hidden_logprobs(hidden, lambda h: h @ kernel, targets, chunk_size=0)

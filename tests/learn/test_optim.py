"""Schedules and optimisers against numbers worked by hand and a plain numpy Adam."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.learn import OptimizerConfig, make_optimizer, make_schedule
from rlhf_jax.testing import tiny_model
from rlhf_jax.types import InputError


def rates(steps: int, updates_per_step: int = 1, **fields) -> list[float]:
    schedule = make_schedule(OptimizerConfig(learning_rate=1.0, **fields), steps, updates_per_step)
    return [float(schedule(count)) for count in range(steps * updates_per_step)]


def test_linear_never_reaches_zero():
    # lr (1 - (update - 1) / updates), Huang et al. 2024
    assert rates(4, schedule="linear") == pytest.approx([1.0, 0.75, 0.5, 0.25])
    assert rates(4, schedule="linear", final_fraction=0.2) == pytest.approx([1.0, 0.8, 0.6, 0.4])


def test_cosine_and_constant():
    half = math.sqrt(0.5)
    assert rates(4, schedule="cosine") == pytest.approx([1.0, (1 + half) / 2, 0.5, (1 - half) / 2])
    assert rates(4, schedule="cosine", final_fraction=0.1)[2] == pytest.approx(0.55)
    assert rates(3) == [1.0, 1.0, 1.0]
    assert rates(3, final_fraction=0.5) == [1.0, 1.0, 1.0]  # nothing to decay to


def test_warm_up_then_decay():
    # three steps of warm-up: 1/4, 2/4, 3/4, then the peak, and 4 steps of decay from there
    got = rates(7, schedule="linear", warmup_steps=3)
    assert got == pytest.approx([0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25])
    assert rates(2, warmup_steps=5) == pytest.approx([1 / 6, 2 / 6])  # a run shorter than its warm-up


def test_the_rate_stands_still_within_a_rollout():
    """4 epochs x 2 minibatches are 8 updates of one step: not one decay per minibatch."""
    got = rates(4, 8, schedule="linear")
    assert got == pytest.approx(np.repeat([1.0, 0.75, 0.5, 0.25], 8).tolist())


def test_past_the_end_the_rate_stays_where_it_ended():
    schedule = make_schedule(OptimizerConfig(learning_rate=2.0, schedule="cosine", final_fraction=0.5), 4)
    assert float(schedule(4)) == float(schedule(1000)) == pytest.approx(1.0)


def numpy_adam(gradients: np.ndarray, *, learning_rate, b1, b2, epsilon, tf, weight_decay=0.0, start=0.0):
    """float64; the parameter after each step."""
    w, m, v, seen = float(start), 0.0, 0.0, []
    for t, g in enumerate(gradients, start=1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        if tf:
            step = math.sqrt(1 - b2**t) / (1 - b1**t) * m / (math.sqrt(v) + epsilon)
        else:
            step = m / (1 - b1**t) / (math.sqrt(v / (1 - b2**t)) + epsilon)
        w -= learning_rate * (step + weight_decay * w)
        seen.append(w)
    return np.array(seen)


@pytest.mark.parametrize("adam", ["optax", "tf"])
@pytest.mark.parametrize("size", [1.0, 1e-5])
def test_adam_equals_the_slow_one(adam, size):
    gradients = size * np.random.default_rng(0).standard_normal(50)
    config = OptimizerConfig(learning_rate=0.1, epsilon=1e-5, adam=adam, b2=0.99, weight_decay=0.3, max_grad_norm=None)
    optimizer = make_optimizer(config, steps=50)

    def one(carry, g):
        params, state = carry
        updates, state = optimizer.update({"kernel": g}, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params["kernel"]

    params = {"kernel": jnp.asarray(2.0)}
    _, seen = jax.jit(lambda p, g: jax.lax.scan(one, (p, optimizer.init(p)), g))(
        params, jnp.asarray(gradients, jnp.float32)
    )
    expected = numpy_adam(
        gradients, learning_rate=0.1, b1=0.9, b2=0.99, epsilon=1e-5, tf=adam == "tf", weight_decay=0.3, start=2.0
    )
    np.testing.assert_allclose(seen, expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(("adam", "share"), [("optax", 0.5), ("tf", 0.0306534)])
def test_first_step_of_the_two_adams(adam, share):
    """g = epsilon = 1e-5. optax: g / (g + eps) = 1/2. tf: sqrt(1 - b2) / (1 - b1) * .1 g / (sqrt(.001) g + eps) = .0306534."""
    config = OptimizerConfig(learning_rate=1.0, epsilon=1e-5, adam=adam, max_grad_norm=None)
    optimizer = make_optimizer(config, steps=1)
    params = {"w": jnp.zeros(())}
    updates, _ = optimizer.update({"w": jnp.asarray(1e-5)}, optimizer.init(params), params)
    assert -float(updates["w"]) == pytest.approx(share, rel=1e-4)


def test_clipping_by_the_global_norm():
    """Gradients (3, 4) have norm 5: with a limit of 1 Adam sees (.6, .8), its first moment a tenth of that."""
    params = {"a": jnp.zeros(()), "b": jnp.zeros(())}
    for limit, factor in ((1.0, 0.2), (10.0, 1.0), (None, 1.0)):
        optimizer = make_optimizer(OptimizerConfig(max_grad_norm=limit), steps=1)
        _, state = optimizer.update({"a": jnp.asarray(3.0), "b": jnp.asarray(4.0)}, optimizer.init(params), params)
        adam = next(each for each in state if isinstance(each, optax.ScaleByAdamState))
        assert (float(adam.mu["a"]), float(adam.mu["b"])) == pytest.approx((0.3 * factor, 0.4 * factor))


def test_weight_decay_touches_matrices_only():
    _, params = tiny_model("lm+scalar", tie_embeddings=False)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1.0, weight_decay=0.5), steps=1)
    zeros = jax.tree.map(np.zeros_like, params)
    updates, _ = jax.jit(lambda grads, params: optimizer.update(grads, optimizer.init(params), params))(zeros, params)
    decayed = {
        jax.tree_util.keystr(path) for path, leaf in jax.tree_util.tree_flatten_with_path(updates)[0] if leaf.any()
    }
    names = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]}
    assert decayed == {name for name in names if "norm" not in name and "bias" not in name}
    np.testing.assert_allclose(updates["embed"]["embedding"], -0.5 * params["embed"]["embedding"], rtol=1e-6)


@pytest.mark.parametrize("adam", ["optax", "tf"])
def test_moments_are_float32_whatever_the_parameters_are(adam):
    params = {"kernel": jnp.ones((2, 2), jnp.bfloat16)}
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.1, weight_decay=0.1, adam=adam), steps=2)
    state = optimizer.init(params)
    types = jax.tree.map(lambda leaf: leaf.dtype, state)
    updates, after = optimizer.update({"kernel": jnp.full((2, 2), 0.1)}, state, params)
    assert jax.tree.map(lambda leaf: leaf.dtype, after) == types
    moments = [leaf.dtype for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert len(moments) == 2 and set(moments) == {jnp.dtype("float32")}
    assert optax.apply_updates(params, updates)["kernel"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rate", -1e-5),
        ("learning_rate", "1e-5"),
        ("learning_rate", float("nan")),
        ("schedule", "polynomial"),
        ("warmup_steps", 1.5),
        ("warmup_steps", -1),
        ("final_fraction", 1.5),
        ("b1", 1.0),
        ("b2", 1.0),
        ("epsilon", -1e-8),
        ("adam", "pytorch"),
        ("weight_decay", True),
        ("max_grad_norm", 0.0),
        ("max_grad_norm", "1"),
        ("max_grad_norm", True),
    ],
)
def test_bad_fields_are_refused_by_name(field, value):
    with pytest.raises(InputError, match=rf"OptimizerConfig\.{field} = "):
        OptimizerConfig(**{field: value})

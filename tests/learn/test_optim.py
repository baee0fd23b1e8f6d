"""Schedules and optimisers against numbers worked by hand and a plain numpy Adam."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.learn import (
    OptimizerConfig,
    initial_state,
    make_optimizer,
    make_schedule,
    make_train_step,
    ppo_optimizer_labels,
)
from rlhf_jax.testing import tiny_model
from rlhf_jax.types import Term


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
    actual = rates(7, schedule="linear", warmup_steps=3)
    assert actual == pytest.approx([0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25])
    assert rates(2, warmup_steps=5) == pytest.approx([1 / 6, 2 / 6])  # a run shorter than its warm-up


def test_the_rate_stands_still_within_a_rollout():
    """4 epochs x 2 minibatches are 8 updates of one step: not one decay per minibatch."""
    actual = rates(4, 8, schedule="linear")
    assert actual == pytest.approx(np.repeat([1.0, 0.75, 0.5, 0.25], 8).tolist())


def test_warm_up_from_zero_is_that_of_transformers():
    """get_linear_schedule_with_warmup(3, 7) and get_cosine_schedule_with_warmup(2, 4) of transformers 5.23: 0, 1/3, 2/3,
    then (7 - k) / 4; 0, 1/2, then (1 + cos(pi (k - 2) / 2)) / 2."""
    assert rates(7, schedule="linear", warmup_steps=3, warmup="from_zero") == pytest.approx(
        [0, 1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25]
    )
    assert rates(4, schedule="cosine", warmup_steps=2, warmup="from_zero") == pytest.approx([0, 0.5, 1, 0.5])
    assert rates(2, warmup_steps=5, warmup="from_zero") == pytest.approx([0, 0.2])
    assert rates(2, warmup="from_zero") == [1.0, 1.0]  # without a warm-up no step is lost


def test_past_the_end_the_rate_stays_where_it_ended():
    schedule = make_schedule(OptimizerConfig(learning_rate=2.0, schedule="cosine", final_fraction=0.5), 4)
    assert float(schedule(4)) == float(schedule(1000)) == pytest.approx(1.0)


def numpy_adam(gradients: np.ndarray, *, learning_rate, b1, b2, epsilon, tf, weight_decay=0.0, start=0.0):
    """float64; the parameter after each step."""
    w, m, v, observed = float(start), 0.0, 0.0, []
    for t, g in enumerate(gradients, start=1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        if tf:
            step = math.sqrt(1 - b2**t) / (1 - b1**t) * m / (math.sqrt(v) + epsilon)
        else:
            step = m / (1 - b1**t) / (math.sqrt(v / (1 - b2**t)) + epsilon)
        w -= learning_rate * (step + weight_decay * w)
        observed.append(w)
    return np.array(observed)


@pytest.mark.parametrize("adam", ["optax", "tf"])
@pytest.mark.parametrize("size", [1.0, 1e-5])
def test_adam_equals_the_slow_one(adam, size):
    gradients = size * np.random.default_rng(0).standard_normal(50)
    config = OptimizerConfig(learning_rate=0.1, epsilon=1e-5, adam=adam, b2=0.99, weight_decay=0.3, max_grad_norm=None)
    optimizer = make_optimizer(config, steps=50, matrices={"kernel": True})

    def one(carry, g):
        params, state = carry
        updates, state = optimizer.update({"kernel": g}, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params["kernel"]

    params = {"kernel": jnp.asarray(2.0)}
    _, observed = jax.jit(lambda p, g: jax.lax.scan(one, (p, optimizer.init(p)), g))(
        params, jnp.asarray(gradients, jnp.float32)
    )
    expected = numpy_adam(
        gradients, learning_rate=0.1, b1=0.9, b2=0.99, epsilon=1e-5, tf=adam == "tf", weight_decay=0.3, start=2.0
    )
    np.testing.assert_allclose(observed, expected, rtol=2e-4, atol=2e-5)


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
        adam = next(value for value in state if isinstance(value, optax.ScaleByAdamState))
        assert (float(adam.mu["a"]), float(adam.mu["b"])) == pytest.approx((0.3 * factor, 0.4 * factor))


EXPERTS = {"num_experts": 4, "experts_per_token": 2, "expert_ffn_size": 16}
BIASES = {"qkv_bias": True, "output_bias": True, "mlp_bias": True, "qk_norm": "head"}


@pytest.mark.parametrize("kinds", [{}, EXPERTS, BIASES], ids=["plain", "experts", "biases"])
def test_weight_decay_touches_matrices_only(kinds):
    """Experts [L, E, D, F] and routers [L, D, E] are matrices; the biases of attention, [L, heads, head_dim], are none."""
    model, params = tiny_model("lm+scalar", tie_embeddings=False, **kinds)
    config = OptimizerConfig(learning_rate=1.0, weight_decay=0.5)
    optimizer = make_optimizer(config, steps=1, matrices=model.matrices())
    zeros = jax.tree.map(np.zeros_like, params)
    updates, _ = jax.jit(lambda grads, params: optimizer.update(grads, optimizer.init(params), params))(zeros, params)
    decayed = {
        jax.tree_util.keystr(path) for path, leaf in jax.tree_util.tree_flatten_with_path(updates)[0] if leaf.any()
    }
    names = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]}
    assert decayed == {name for name in names if "norm" not in name and "bias" not in name}
    np.testing.assert_allclose(updates["embed"]["embedding"], -0.5 * params["embed"]["embedding"], rtol=1e-6)


def test_weight_decay_of_a_part_of_the_parameters():
    """One optimiser of several, as in PPO: its mask sees the other's leaves as absent."""
    params = {"policy": {"w": jnp.ones(2), "b": jnp.ones(2)}, "value": {"w": jnp.ones(2)}}
    matrices = {"policy": {"w": True, "b": False}, "value": {"w": True}, "base": {"w": True}}
    config = OptimizerConfig(learning_rate=1.0, weight_decay=0.5)
    parts = {name: make_optimizer(config, 1, matrices=matrices) for name in params}
    optimizer = optax.partition(parts, ppo_optimizer_labels)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    assert jax.tree.map(lambda x: x[0].item(), updates) == {"policy": {"w": -0.5, "b": 0.0}, "value": {"w": -0.5}}


def test_weight_decay_needs_to_know_what_is_a_matrix():
    config = OptimizerConfig(weight_decay=0.5)
    with pytest.raises(InputError, match="weight_decay acts on matrices: say which"):
        make_optimizer(config, 1)
    with pytest.raises(InputError, match=r"matrices has no leaf \['w'\], which is trained"):
        make_optimizer(config, 1, matrices={"v": True}).init({"w": jnp.ones(2)})


@pytest.mark.parametrize("adam", ["optax", "tf"])
def test_moments_are_float32_whatever_the_parameters_are(adam):
    params = {"kernel": jnp.ones((2, 2), jnp.bfloat16)}
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.1, adam=adam)
    optimizer = make_optimizer(config, steps=2, matrices={"kernel": True})
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
        ("warmup", "zero"),
        ("final_fraction", 1.5),
        ("b1", 1.0),
        ("b2", 1.0),
        ("epsilon", -1e-8),
        ("adam", "pytorch"),
        ("weight_decay", True),
        ("max_grad_norm", 0.0),
        ("max_grad_norm", "1"),
        ("learning_rate", 1e-300),  # 0 in float32, in which numbers are used; so is what follows
        ("epsilon", 1e-60),
        ("max_grad_norm", 1e-60),
        ("max_grad_norm", 1e300),  # infinity
        ("b2", 0.99999999999),  # 1
        ("warmup_steps", 2**40),
        ("max_grad_norm", True),
    ],
)
def test_bad_fields_are_refused_by_name(field, value):
    with pytest.raises(InputError, match=rf"OptimizerConfig\.{field} = "):
        OptimizerConfig(**{field: value})


# ---- spikes


def spiky_step(spike: float | None, memory: int = 4):
    """A step whose loss is w + the batch's number: the gradient is 1, Adam moves w by the learning rate."""

    def loss(params, frozen, batch, rng):
        del frozen, rng
        return {"nll": Term(params["w"] + batch.sum(), jnp.ones(()))}, {}

    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-3, spike=spike, spike_memory=memory), 100)
    state = initial_state({"w": jnp.zeros(())}, optimizer, jax.random.key(0))
    return jax.jit(make_train_step(loss, optimizer)), state


def numpy_spikes(observed: list[float], sigmas: float, memory: int) -> list[bool]:
    """float64, from the definition: plain mean and variance of what was accepted while it is not more than ``memory``."""
    accepted: list[float] = []
    refused = []
    for value in observed:
        mean, deviation = (np.mean(accepted), np.std(accepted)) if accepted else (0.0, 0.0)
        bad = len(accepted) >= min(memory, 20) and value > mean + sigmas * max(deviation, abs(mean) / 100)
        refused.append(bool(bad))
        accepted += [] if bad else [value]
    return refused


def test_a_spike_changes_nothing_and_training_continues():
    step, state = spiky_step(spike=3.0, memory=20)
    rng = np.random.default_rng(0)
    losses = [*rng.normal(5.0, 0.5, 24), 50.0, *rng.normal(5.0, 0.5, 3), 20.0, 5.0]
    refused, before = [], state
    for value in losses:
        state, metrics = step(state, {}, jnp.asarray([value], jnp.float32))
        refused.append(bool(metrics["refused"].value()))
        if refused[-1]:
            assert float(state.params["w"]) == float(before.params["w"])
            for a, b in zip(
                jax.tree.leaves(before.opt_state.inner), jax.tree.leaves(state.opt_state.inner), strict=True
            ):
                np.testing.assert_array_equal(a, b)
        else:
            assert float(state.params["w"]) < float(before.params["w"])
        before = state
    assert refused == [index in (24, 28) for index in range(len(losses))]
    # w moves the loss by 0.03 at most: far from any decision
    assert numpy_spikes(losses[:20] + losses[24:25], 3.0, 20)[-1] and int(state.step) == len(losses)


def test_early_spike_statistics_are_those_of_numpy():
    step, state = spiky_step(spike=2.0, memory=50)
    losses = np.random.default_rng(1).normal(3.0, 1.0, 40)
    refused = []
    for value in losses:
        state, metrics = step(state, {}, jnp.asarray([value], jnp.float32))
        refused.append(bool(metrics["refused"].value()))
    expected = numpy_spikes(list(losses), 2.0, 50)
    assert refused == expected and any(expected)
    accepted = [value for value, bad in zip(losses, expected, strict=True) if not bad]
    assert float(state.opt_state.mean[0]) == pytest.approx(np.mean(accepted), abs=0.05)
    assert float(state.opt_state.variance[0]) == pytest.approx(np.var(accepted), abs=0.05)
    assert float(state.opt_state.mean[1]) == 1.0  # the gradient's norm


def test_not_finite_does_not_enter_the_statistics():
    step, state = spiky_step(spike=6.0)
    for value in (1.0, np.nan, 1.0):
        state, metrics = step(state, {}, jnp.asarray([value], jnp.float32))
        assert bool(metrics["refused"].value()) == np.isnan(value)
    assert int(state.opt_state.accepted) == 2 and np.isfinite(state.opt_state.mean).all()


@pytest.mark.parametrize(
    ("field", "value"), [("spike", 0.0), ("spike", True), ("spike_memory", 1), ("spike_memory", 2.5)]
)
def test_bad_spike_fields(field, value):
    with pytest.raises(InputError, match=rf"^OptimizerConfig\.{field} = {value!r}: give"):
        OptimizerConfig(**{field: value})

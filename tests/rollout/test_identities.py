"""Identities of a PPO iteration before any learning, at temperature .7, policy = reference.

Exact where the same program reads the same text twice; elsewhere (sampler against scorer, scorer against update) within
a tolerance of the dtype.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax import learn, rollout
from rlhf_jax.algorithms.scoring import policy_and_values, score
from rlhf_jax.learn import OptimizerConfig, PPOConfig
from rlhf_jax.models import Model
from rlhf_jax.testing import count_reward, random_params, random_prompts, tiny_config
from rlhf_jax.types import Rollout

ROWS = 8
TEMPERATURE = 0.7
SAMPLING = rollout.SamplingConfig(temperature=TEMPERATURE, max_new_tokens=6)
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.08}
"""Largest |difference of a token's log-probability| between two programs, in nats. bfloat16 logits of this model (spread
3) have an error of .02 each."""


CONFIG = PPOConfig(epochs=2, minibatches=2, missing_eos_penalty=None)


def build(shared: bool, dtype: str):
    """Return (models, parameters, policy function of the loss)."""
    policy = Model(tiny_config(head="lm+scalar" if shared else "lm", compute_dtype=dtype))
    reference, value = policy.with_head("lm"), None if shared else policy.with_head("scalar")
    params = {"policy": random_params(policy, 0)} | ({} if value is None else {"value": random_params(value, 5)})
    models = {"policy": policy, "reference": reference} | ({} if value is None else {"value": value})

    def policy_fn(params, completions):
        return policy_and_values(models, params, completions, temperature=TEMPERATURE)

    return models, params, policy_fn


@functools.cache
def collected(shared: bool, dtype: str):
    """Return (completions, rollout, prepared batch, metrics) with the policy as its own reference."""
    models, params, _ = build(shared, dtype)

    @jax.jit
    def collect(params):
        completions = rollout.generate(
            models["policy"], params["policy"], random_prompts(0, ROWS, 4, 64), jax.random.key(0), sampling=SAMPLING,
            eos_ids=tuple(range(2, 10)), pad_id=0,
        )  # fmt: skip
        trunk = {name: tree for name, tree in params["policy"].items() if name != "scalar_head"}
        scored = score(models, {**params, "reference": trunk}, completions, temperature=TEMPERATURE)
        scored = Rollout.of(scored, {"count": count_reward(completions, 19)})
        return completions, scored, *learn.prepare(scored, CONFIG, jnp.asarray(0.05))

    return collect(params)


@functools.cache
def updater(shared: bool, dtype: str):
    """Return the initial state and the compiled update with the learning rate as an argument."""
    _, params, policy_fn = build(shared, dtype)

    def optimizer(learning_rate):
        one = {name: learn.make_optimizer(OptimizerConfig(learning_rate=1.0), 1) for name in ("policy", "value")}
        return optax.chain(optax.partition(one, learn.ppo_optimizer_labels), optax.scale(learning_rate))

    def call(state, prepared, learning_rate):
        loss = learn.make_ppo_loss(policy_fn, CONFIG)
        step = learn.make_train_step(loss, optimizer(learning_rate), microbatches=2)
        return learn.update(step, state, prepared, jax.random.key(2), CONFIG)

    return learn.initial_state(jax.tree.map(jnp.asarray, params), optimizer(0.0), jax.random.key(1)), jax.jit(call)


CASES = ((False, "float32"), (True, "float32"), (False, "bfloat16"))


@pytest.mark.parametrize(("shared", "dtype"), CASES)
def test_divergence_from_itself_is_exactly_zero(shared, dtype):
    completions, scored, _, metrics = collected(shared, dtype)
    assert 0 < completions.ended.sum() < ROWS
    np.testing.assert_array_equal(scored.logprobs, scored.ref_logprobs)
    assert float(metrics["kl"].value()) == float(metrics["kl_per_token"].value()) == 0.0


@pytest.mark.parametrize(("shared", "dtype"), CASES)
def test_sampler_and_scorer_agree(shared, dtype):
    completions, scored, _, metrics = collected(shared, dtype)
    np.testing.assert_allclose(scored.logprobs, completions.logprobs, atol=TOLERANCE[dtype])
    assert float(metrics["sampler_gap_max"].value()) <= TOLERANCE[dtype]
    assert float(metrics["sampler_gap"].value()) <= TOLERANCE[dtype] / 3


@pytest.mark.parametrize(("shared", "dtype"), [*CASES[:2], pytest.param(*CASES[2], marks=pytest.mark.slow)])
def test_learning_rate_zero_changes_nothing(shared, dtype):
    """Through both epochs, minibatches and microbatches the ratio stays 1 (trlx issues 107 and 508)."""
    state, update = updater(shared, dtype)
    after, updated = update(state, collected(shared, dtype)[2], 0.0)
    near = TOLERANCE[dtype]
    assert float(updated["identity/identity_gap"].value()) <= 2 * near  # two microbatches
    assert float(updated["ratio"].value()) == pytest.approx(1.0, abs=near)
    for name in ("approx_kl_k1", "approx_kl_k2", "approx_kl_k3"):
        assert float(updated[name].value()) == pytest.approx(0.0, abs=near**2 if name != "approx_kl_k1" else near)
    assert float(updated["clip_fraction"].value()) == 0.0
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(after.params), strict=True):
        np.testing.assert_array_equal(a, b)
    assert int(after.step) == 4 and float(updated["grad_norm"].value()) > 1e-3


@pytest.mark.parametrize("shared", [False, True])
def test_a_learning_rate_changes_trunk_and_head(shared):
    """The identities hold in the first minibatch, but not over the whole update; trunk and head are both trained."""
    state, update = updater(shared, "float32")
    after, updated = update(state, collected(shared, "float32")[2], 1e-3)
    assert float(updated["identity/identity_gap"].value()) <= 2 * TOLERANCE["float32"]
    assert float(updated["approx_kl_k2"].value()) > 1e-6
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), state.params, after.params)
    head = moved["policy"]["scalar_head"] if shared else moved["value"]["scalar_head"]
    assert head["kernel"] > 1e-4 and head["bias"] > 1e-4
    trunks = [moved["policy"]] if shared else [moved["policy"], moved["value"]]
    for trunk in trunks:
        assert trunk["embed"]["embedding"] > 1e-4 and trunk["layers"]["mlp"]["up"]["kernel"] > 1e-4

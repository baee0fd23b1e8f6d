"""The functions the experiments run, as they are wired: one temperature everywhere, the frozen reference and reward where
they belong, one learning rate per rollout."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import algorithms, rollout
from rlhf_jax.data.batch_config import BatchConfig
from rlhf_jax.learn import OptimizerConfig, PPOConfig
from rlhf_jax.models import Model
from rlhf_jax.parallel import to_global
from rlhf_jax.testing import IN_MEMORY, mesh_of, random_params, random_prompts, roles_of, setting_of, tiny_config

ROWS = 8
PPO = PPOConfig(epochs=2, minibatches=2, kl_coefficient=0.3, missing_eos_penalty=None)
SAMPLING = rollout.SamplingConfig(temperature=0.7, max_new_tokens=6)
ENDS = {"eos_ids": tuple(range(2, 10)), "pad_id": 0}


def described(config=PPO, rates=None, microbatches=1, **settings):
    names = ("policy_optimizer", "value_optimizer")
    return algorithms.PPO(
        policy=IN_MEMORY,
        batch=BatchConfig(ROWS, 4, microbatches),
        sampling=SAMPLING,
        ppo=config,
        **dict(zip(names, rates or [OptimizerConfig()] * 2, strict=True)),
        **settings,
    )


def test_the_learning_rate_is_constant_within_an_iteration():
    """Under a constant gradient Adam moves by its rate: 2 epochs x 2 minibatches at the full rate, then 4 at half."""
    rates = [OptimizerConfig(learning_rate=rate, schedule="linear") for rate in (0.1, 0.01)]
    model = Model(tiny_config())
    roles = roles_of(policy=(model, model.abstract()), value=(model, model.abstract()))
    optimizer = described(rates=rates)._optimizer(2, roles)
    params = {"policy": {"w": jnp.zeros(())}, "value": {"w": jnp.zeros(())}}
    state, moved = optimizer.init(params), []
    for _ in range(8):
        updates, state = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
        moved.append((-float(updates["policy"]["w"]), -float(updates["value"]["w"])))
    expected = [(0.1, 0.01)] * 4 + [(0.05, 0.005)] * 4
    np.testing.assert_allclose(moved, expected, rtol=1e-4)


@pytest.mark.parametrize("share_trunk", [False, True])
def test_a_value_head_on_the_policys_trunk_begins_at_zero(share_trunk):
    """Ziegler et al. 2019: every value 0 at first. A value model of its own begins as it was loaded."""
    model = Model(tiny_config(head="lm+scalar" if share_trunk else "lm"))
    params = {"policy": random_params(model, 0)}
    if not share_trunk:
        params["value"] = random_params(model.with_head("scalar"), 1)
    owners = {"policy": model, "value": model.with_head("scalar")}
    roles = roles_of(**{role: (owners[role], tree) for role, tree in params.items()})
    state = described(share_trunk=share_trunk).wire(setting_of(mesh_of()), roles, ENDS).state
    expected = params if not share_trunk else {"policy": {**params["policy"], "scalar_head": {"bias": 0, "kernel": 0}}}
    jax.tree.map(lambda actual, leaf: np.testing.assert_array_equal(actual, np.broadcast_to(leaf, actual.shape)),
                 state.train.params, expected)  # fmt: skip
    assert float(state.kl_coefficient) == pytest.approx(0.3) and int(state.train.step) == 0


@functools.cache
def built():
    """(the four functions, a maker of the state at step 0, frozen parameters) at temperature .7.

    The policy begins as the reference; the value model as the reward model.
    """
    policy = Model(tiny_config(head="lm"))
    scalar = policy.with_head("scalar")
    pair = {"policy": (policy, random_params(policy, 0)), "value": (scalar, random_params(scalar, 5))}
    roles = roles_of(**pair, reference=pair["policy"], reward=pair["value"])
    algorithm = described(rates=(OptimizerConfig(learning_rate=1e-3),) * 2, microbatches=2)

    def job():  # with a state of its own, because an update donates it
        return algorithm.wire(setting_of(mesh_of()), roles, ENDS)

    return job(), lambda: job().state, roles.frozen


UNSCORED = ({}, np.ones(ROWS, bool))
"""No scores of texts; every response could be scored."""


@functools.cache
def iteration():
    """(completions, rollout, metrics, a rollout scored by other parameters, metrics of the update) of one iteration."""
    job, fresh, frozen = built()
    state = fresh()
    completions = job.generate(state.train.params, frozen, random_prompts(0, ROWS, 4, 64), jax.random.key(0))
    # What the policy has become after some training must reach neither the reference nor the reward.
    other = {"policy": random_params(Model(tiny_config(head="lm")), 1)}
    other["value"] = random_params(Model(tiny_config(head="scalar")), 2)
    moved = jax.device_get(job.score(other, frozen, completions))
    scored = job.score(state.train.params, frozen, completions)
    prepared, metrics = job.prepare(scored, *UNSCORED, state.kl_coefficient)
    remaining = jax.device_get((completions, scored, metrics, moved))
    _, updated = job.update(state, frozen, prepared, jax.random.key(2), metrics)
    return *remaining, jax.device_get(updated)


def test_nothing_is_traced_or_compiled_twice():
    """Three iterations with prompts and replies of other lengths: JAX reports traces and compilations in the first only."""
    job, fresh, frozen = built()
    state, observed, lengths = fresh(), [], set()

    def listen(event: str, duration: float, **about) -> None:
        del duration
        if event in ("/jax/core/compile/jaxpr_trace_duration", "/jax/core/compile/backend_compile_duration"):
            observed.append((event, about))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for index in range(3):
            before = len(observed)
            prompts = to_global(random_prompts(index, ROWS, 4, 64), mesh_of())
            completions = job.generate(state.train.params, frozen, prompts, jax.random.key(index))
            scored = job.score(state.train.params, frozen, completions)
            prepared, metrics = job.prepare(scored, *to_global(UNSCORED, mesh_of()), state.kl_coefficient)
            state, _ = job.update(state, frozen, prepared, jax.random.key(index), metrics)
            lengths.add(tuple(np.asarray(completions.mask).sum(axis=1)))
            assert index == 0 or observed[before:] == []
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert len(lengths) == 3 and observed


def test_sampler_scorer_and_update_use_one_temperature():
    """A temperature on one side only is a gap between sampler and scorer, a KL to itself or a ratio that is not 1."""
    completions, scored, metrics, _, updated = iteration()
    assert 0 < completions.ended.sum() < ROWS and float(metrics["sampler_gap_max"].value()) < 1e-5
    np.testing.assert_array_equal(scored.logprobs, scored.ref_logprobs)
    assert float(updated["identity/identity_gap"].value()) < 2e-5  # two microbatches
    assert float(updated["identity/ratio"].value()) == pytest.approx(1.0, abs=1e-5)
    assert float(updated["approx_kl_k2"].value()) > 1e-8  # and then it learns


def test_reference_and_reward_model_stay_fixed():
    """The frozen parameters are arguments of their own; the policy's and the value model's are read by the others."""
    completions, scored, _, moved, _ = iteration()
    np.testing.assert_array_equal(moved.ref_logprobs, scored.ref_logprobs)
    scores = scored.scores["reward"]
    np.testing.assert_array_equal(moved.scores["reward"], scores)
    assert np.abs(moved.logprobs - scored.logprobs).max() > 0.1 and np.abs(moved.values - scored.values).max() > 0.1
    # The value model began as the reward model: behind the last token its value is the score.
    ends = completions.mask.sum(axis=1)
    for row in np.flatnonzero(ends < SAMPLING.max_new_tokens):
        assert scored.values[row, ends[row]] == pytest.approx(scores[row], abs=1e-5)
    assert np.ptp(scores) > 0.1

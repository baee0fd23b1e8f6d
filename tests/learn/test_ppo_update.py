"""The clipped update: losses by hand, minibatches, and the identities that hold before anything has been learned."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax import learn, ops
from rlhf_jax.errors import InputError, RunStopped
from rlhf_jax.learn import OptimizerConfig, PPOConfig, make_ppo_loss, minibatch_indices, ppo_optimizer_labels, update
from rlhf_jax.testing import completions, prompt_batch
from rlhf_jax.types import Mean, PolicyBatch

KEY = jax.random.key(0)


def policy_batch(responses, length=4, **arrays) -> PolicyBatch:
    """Rows of numbers per response; NaN outside of it, where nothing may be read (0 in advantages, which are weights)."""
    outcome = completions(prompt_batch([[5]] * len(responses)), responses, length=length)

    def filled(name, outside):
        rows = arrays.get(name, [[0.0] * len(row) for row in responses])
        return np.stack([np.float32([*row, *[outside] * (length - len(row))]) for row in rows])

    return PolicyBatch(
        completions=outcome,
        old_logprobs=filled("old_logprobs", np.nan),
        old_values=filled("old_values", 0.0),
        advantages=filled("advantages", 0.0),
        returns=filled("returns", 0.0),
        value_mask=outcome.mask,
    )


def fixed_policy(logprobs, values=None, entropy=None):
    """A policy whose outputs are fixed_policy numbers times a parameter, NaN outside."""

    def policy_fn(params, completions):
        def rows(numbers):
            width = completions.tokens.shape[1]
            return jnp.stack([jnp.float32([*row, *[jnp.nan] * (width - len(row))]) for row in numbers])

        zeros = [[0.0] * len(row) for row in logprobs]
        return (
            rows(logprobs) + jnp.where(completions.mask, params["policy"], 0.0),
            rows(entropy or zeros),
            rows(values or zeros) + jnp.where(completions.mask, params["value"], 0.0),
        )

    return policy_fn


PARAMS = {"policy": jnp.zeros(()), "value": jnp.zeros(())}


def measure(policy_fn, batch, **fields):
    return learn.gradients(make_ppo_loss(policy_fn, PPOConfig(**fields)), PARAMS, {}, batch, KEY, 1)


def test_policy_loss_by_hand():
    """Ratios 1.349859, .904837, .606531; A = 1, -.5, -1; losses -1.2 (clipped), .452419, .8 (clipped); mean .017473."""
    batch = policy_batch([(7, 8, 2)], old_logprobs=[[-1.3, -0.4, -1.5]], advantages=[[1.0, -0.5, -1.0]])
    grads, metrics = measure(fixed_policy([[-1.0, -0.5, -2.0]]), batch)
    expected = {
        "loss/policy": 0.017473, "clip_fraction": 2 / 3, "ratio": (1.349859 + 0.904837 + 0.606531) / 3,
        "approx_kl_k1": 0.1, "approx_kl_k2": 0.0583333, "approx_kl_k3": 0.0537423, "identity_gap": 0.5, "loss": 0.017473,
    }  # fmt: skip
    for name, value in expected.items():
        assert float(metrics[name].value()) == pytest.approx(value, abs=1e-6), name
    # only the unclipped token has a gradient: -A ratio / 3 = .5 * .904837 / 3
    assert float(grads["policy"]) == pytest.approx(0.150806, abs=1e-6)


def test_value_loss_by_hand():
    """V = 1, 0; old .5, .1; R = .2, 1; clip .2: squares .64 and 1, half their mean .41; unclipped branch: .41 too."""
    batch = policy_batch([(7, 2)], old_values=[[0.5, 0.1]], returns=[[0.2, 1.0]])
    for clip, loss, fraction in ((0.2, 0.41, 0.0), (None, 0.41, 0.0)):
        grads, metrics = measure(
            fixed_policy([[0.0, 0.0]], [[1.0, 0.0]]), batch, value_clip=clip, value_coefficient=0.1
        )
        assert float(metrics["loss/value"].value()) == pytest.approx(loss, abs=1e-6)
        assert float(metrics["loss"].value()) == pytest.approx(0.1 * loss, abs=1e-6)
        assert float(metrics["value_clip_fraction"].value()) == fraction
        assert float(grads["value"]) == pytest.approx(0.1 * (0.8 - 1.0) / 2, abs=1e-6)
    # V moved from .5 to 1, past its return .9: clipped to .6, (.6 - .9)^2 = .09 > (1 - .9)^2, gradient 0
    moved = policy_batch([(7, 2)], old_values=[[0.5, 0.0]], returns=[[0.9, 0.0]])
    grads, metrics = measure(fixed_policy([[0.0, 0.0]], [[1.0, 0.0]]), moved, value_clip=0.1, value_coefficient=1.0)
    assert float(metrics["loss/value"].value()) == pytest.approx(0.09 / 2 / 2, abs=1e-6)
    assert float(metrics["value_clip_fraction"].value()) == 0.5 and float(grads["value"]) == 0.0


def test_values_count_where_their_own_mask_says():
    """Under "after_eos" the value mask has a column more than the policy's: three squares, two tokens, each mean its own."""
    batch = policy_batch([(7, 2)], length=3, advantages=[[1.0, 1.0]])
    batch = batch.replace(
        value_mask=np.array([[True, True, True]]),
        old_values=np.zeros((1, 3), np.float32),
        returns=np.float32([[1, 1, 2]]),
    )

    def policy_fn(params, completions):
        logprobs = jnp.where(completions.mask, params["policy"], jnp.nan)
        return logprobs, jnp.zeros((1, 3)), jnp.zeros((1, 3)) + params["value"]

    batch = batch.replace(old_logprobs=np.float32([[0.0, 0.0, np.nan]]))
    grads, metrics = measure(policy_fn, batch, value_clip=None, value_coefficient=1.0)
    assert float(metrics["loss/value"].value()) == pytest.approx((1 + 1 + 4) / 2 / 3)
    assert float(metrics["loss/policy"].value()) == pytest.approx(-1.0)
    assert float(metrics["loss"].value()) == pytest.approx(-1.0 + 1.0)
    assert float(grads["value"]) == pytest.approx(-(1 + 1 + 2) / 3)
    # old value 1.5 behind the end, where V = 0 is clipped to 1.3: (1.3 - 2)^2 < (0 - 2)^2; old value -1: (-.8 - 2)^2 is larger
    moved = batch.replace(old_values=np.float32([[0.0, 0.0, -1.0]]))
    _, metrics = measure(policy_fn, moved, value_clip=0.2, value_coefficient=1.0)
    assert float(metrics["value_clip_fraction"].value()) == pytest.approx(1 / 3)


@pytest.mark.parametrize(("dual_clip", "loss"), [(None, 5.0), (3.0, 3.0)])
def test_dual_clip_by_hand(dual_clip, loss):
    batch = policy_batch([(7,)], old_logprobs=[[0.0]], advantages=[[-1.0]])
    grads, metrics = measure(fixed_policy([[float(np.log(5.0))]]), batch, dual_clip=dual_clip)
    assert float(metrics["loss/policy"].value()) == pytest.approx(loss, rel=1e-6)
    assert float(grads["policy"]) == pytest.approx(0.0 if dual_clip else 5.0, rel=1e-6)


@pytest.mark.parametrize(("low", "high", "loss"), [(0.2, 0.2, -1.2), (0.2, 0.28, -1.28), (0.2, 0.0, -1.0)])
def test_the_two_clips_are_apart(low, high, loss):
    batch = policy_batch([(7, 8)], old_logprobs=[[0.0, 0.0]], advantages=[[1.0, -1.0]])
    _, metrics = measure(fixed_policy([[0.5, -0.5]]), batch, clip_low=low, clip_high=high)  # ratios 1.65, .61
    assert float(metrics["loss/policy"].value()) == pytest.approx((loss + 0.8) / 2, rel=1e-5)


def test_entropy_is_a_bonus_over_tokens():
    batch = policy_batch([(7, 8, 2), (7,)])
    _, metrics = measure(
        fixed_policy([[0.0] * 3, [0.0]], entropy=[[1.0, 2.0, 3.0], [6.0]]), batch, entropy_coefficient=0.5
    )
    assert float(metrics["entropy"].value()) == 3.0
    assert float(metrics["loss"].value()) == pytest.approx(-1.5)


def test_padding_reaches_neither_loss_nor_gradient():
    """NaN stands in every padding column of the policy's outputs and of the old log-probabilities."""
    rows = [(7, 8, 2), (7,)]
    numbers = {"old_logprobs": [[-1.0, -0.9, -1.1], [-1.0]], "advantages": [[1.0, -1.0, 0.5], [2.0]]}
    grads, metrics = measure(fixed_policy([[-1.0] * 3, [-1.2]], [[1.0] * 3, [0.5]]), policy_batch(rows, **numbers))
    wide, more = measure(
        fixed_policy([[-1.0] * 3, [-1.2]], [[1.0] * 3, [0.5]]), policy_batch(rows, length=9, **numbers)
    )
    for name in metrics:
        assert np.isfinite(metrics[name].value())
        np.testing.assert_allclose(more[name].value(), metrics[name].value(), rtol=1e-6, err_msg=name)
    for name in grads:
        np.testing.assert_allclose(wide[name], grads[name], rtol=1e-6)


def test_minibatches_see_every_row_once_an_epoch():
    config = PPOConfig(epochs=3, minibatches=4)
    indices = minibatch_indices(KEY, 16, config)
    assert indices.shape == (12, 4) and indices.dtype == jnp.int32
    epochs = indices.reshape(3, 16)
    assert [sorted(epoch.tolist()) for epoch in epochs] == [list(range(16))] * 3
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 3
    np.testing.assert_array_equal(indices, minibatch_indices(KEY, 16, config))
    assert (indices != minibatch_indices(jax.random.key(1), 16, config)).any()
    with pytest.raises(InputError, match="a rollout of 15 rows does not divide into .*minibatches = 4"):
        minibatch_indices(KEY, 15, config)


# ---- a policy that is a table: logits of the next token by the row's prompt token


def table_policy(params, completions):
    logits = params["policy"]["logits"][completions.prompts.tokens[:, -1]][:, None]
    logits = jnp.broadcast_to(logits, (*completions.tokens.shape, logits.shape[-1]))
    values = jnp.broadcast_to(
        params["value"]["by_prompt"][completions.prompts.tokens[:, -1]][:, None], completions.tokens.shape
    )
    return ops.token_logprobs(logits, completions.tokens, 0.7), ops.entropy_from_logits(logits, 0.7), values


ROWS = 8
TABLE = {
    "policy": {"logits": np.random.default_rng(0).standard_normal((ROWS, 12)).astype(np.float32)},
    "value": {"by_prompt": np.random.default_rng(1).standard_normal(ROWS).astype(np.float32)},
}


def table_batch() -> PolicyBatch:
    rng = np.random.default_rng(2)
    responses = [rng.integers(3, 12, n).tolist() for n in rng.integers(1, 5, ROWS)]
    outcome = completions(prompt_batch([[row] for row in range(ROWS)]), responses, length=4)
    logprobs, _, values = jax.jit(table_policy)(TABLE, outcome)
    noise = rng.standard_normal((2, ROWS, 4)).astype(np.float32)
    return PolicyBatch(
        outcome, np.asarray(logprobs), np.where(outcome.mask, values, 0), np.where(outcome.mask, noise[0], 0),
        np.where(outcome.mask, noise[1], 0), outcome.mask,
    )  # fmt: skip


@functools.cache
def run_update(config: PPOConfig, learning_rate: float, microbatches: int = 1):
    """Two optimisers, one for the policy and one (ten times faster) for the values; returns (state, metrics)."""
    optimizers = {
        name: learn.make_optimizer(OptimizerConfig(learning_rate=rate), 10)
        for name, rate in (("policy", learning_rate), ("value", 10 * learning_rate))
    }
    optimizer = optax.partition(optimizers, ppo_optimizer_labels)
    step = learn.make_train_step(make_ppo_loss(table_policy, config), optimizer, microbatches=microbatches)
    state = learn.initial_state(jax.tree.map(jnp.asarray, TABLE), optimizer, KEY)
    return jax.jit(lambda state, batch: update(step, state, batch, jax.random.key(3), config))(state, table_batch())


@pytest.mark.parametrize("microbatches", [1, 2])
def test_with_learning_rate_zero_the_ratio_stays_one(microbatches):
    """Over 3 epochs x 2 minibatches x microbatches: one chunk that reads other columns or masks shows here."""
    state, metrics = run_update(PPOConfig(epochs=3, minibatches=2), 0.0, microbatches)
    assert int(state.step) == 6
    for name, value in (
        ("ratio", 1.0),
        ("approx_kl_k1", 0.0),
        ("approx_kl_k2", 0.0),
        ("approx_kl_k3", 0.0),
        ("clip_fraction", 0.0),
    ):
        assert float(metrics[name].value()) == pytest.approx(value, abs=1e-6), name
    for name in ("identity_gap", "approx_kl_k2", "clip_fraction"):
        assert float(metrics[f"identity/{name}"].value()) == pytest.approx(0.0, abs=2e-6), name
    assert float(metrics["identity/ratio"].value()) == pytest.approx(1.0, abs=1e-6)
    np.testing.assert_array_equal(state.params["policy"]["logits"], TABLE["policy"]["logits"])
    # and the policy's gradient is not zero: its loss is minus the mean advantage of each minibatch
    assert float(metrics["grad_norm"].value()) > 1e-3


def test_the_loss_of_an_update_is_the_sum_of_its_pooled_terms():
    """A mean of the minibatches' losses would weigh a minibatch of few tokens like one of many."""
    config = PPOConfig(epochs=2, minibatches=2, value_coefficient=0.25, entropy_coefficient=0.5)
    _, metrics = run_update(config, 0.05)
    values = {name: float(mean.value()) for name, mean in metrics.items()}
    whole = values["loss/policy"] + 0.25 * values["loss/value"] - 0.5 * values["loss/entropy"]
    np.testing.assert_allclose(values["loss"], whole, rtol=1e-6)
    assert values["loss/entropy"] == values["entropy"] > 0


def test_identities_are_of_the_first_minibatch_only():
    _, metrics = run_update(PPOConfig(epochs=3, minibatches=2), 0.05)
    assert float(metrics["identity/identity_gap"].value()) < 2e-6
    assert float(metrics["approx_kl_k2"].value()) > 1e-3 and "identity_gap" not in metrics
    assert float(metrics["ratio"].weight) == 3 * table_batch().completions.mask.sum()


def test_microbatches_change_nothing_in_a_whole_update():
    config = PPOConfig(epochs=2, minibatches=2, entropy_coefficient=0.01)
    (one, metrics), (two, split) = (run_update(config, 0.05, count) for count in (1, 2))
    assert int(one.step) == int(two.step) == 4
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(two.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    for name in metrics.keys() - {"identity/identity_gap"}:  # a sum of maxima, near 0 in both
        np.testing.assert_allclose(metrics[name].value(), split[name].value(), rtol=1e-4, atol=1e-5, err_msg=name)


def test_the_gap_of_one_bad_row_is_not_averaged_away():
    """Four microbatches, one row with a log ratio of 1: at least 1 is reported, not the mean of the maxima."""
    config = PPOConfig(epochs=1, minibatches=1)
    batch = table_batch()
    wrong = np.where(np.arange(ROWS)[:, None] == 3, batch.old_logprobs - 1.0, batch.old_logprobs)
    optimizer = learn.make_optimizer(OptimizerConfig(learning_rate=0.0), 1)
    step = learn.make_train_step(make_ppo_loss(table_policy, config), optimizer, microbatches=4)
    state = learn.initial_state(TABLE, optimizer, KEY)
    call = jax.jit(lambda state, batch: update(step, state, batch, KEY, config))
    _, metrics = call(state, batch.replace(old_logprobs=wrong))
    assert 1.0 - 1e-5 <= float(metrics["identity/identity_gap"].value()) < 1.001


def test_each_optimiser_moves_its_own_parameters():
    """Adam moves every touched entry by about its learning rate in the first step: .01 and .1."""
    state, _ = run_update(PPOConfig(epochs=1), 0.01)
    moved = jax.tree.map(lambda new, old: np.abs(new - old).max(), state.params, TABLE)
    assert float(moved["policy"]["logits"]) == pytest.approx(0.01, rel=0.01)
    assert float(moved["value"]["by_prompt"]) == pytest.approx(0.1, rel=0.01)
    assert ppo_optimizer_labels(TABLE) == {"policy": {"logits": "policy"}, "value": {"by_prompt": "value"}}
    # value_coefficient 0: the values stand still, the policy does not
    still, _ = run_update(PPOConfig(epochs=1, value_coefficient=0.0), 0.01)
    np.testing.assert_array_equal(still.params["value"]["by_prompt"], TABLE["value"]["by_prompt"])
    np.testing.assert_allclose(still.params["policy"]["logits"], state.params["policy"]["logits"], atol=1e-6)


@pytest.mark.parametrize(
    ("scope", "ddof", "whitened"), [("minibatch", 0, True), ("minibatch", 1, True), ("none", 0, False)]
)
def test_advantages_whitened_in_each_minibatch(scope, ddof, whitened):
    """What a step sees has mean 0 and variance 1 over its own tokens (not over those of the value function); over the
    rollout it would not."""
    zero = Mean(jnp.zeros(()), jnp.ones(()))

    def spying_step(state, frozen, batch):
        del frozen
        count, advantages, masks = state
        observed = (count + 1, advantages.at[count].set(batch.advantages), masks.at[count].set(batch.completions.mask))
        names = ("identity_gap", "approx_kl_k2", "clip_fraction", "ratio", "loss/policy", "loss/value")
        return observed, dict.fromkeys(names, zero)

    config = PPOConfig(epochs=1, minibatches=4, whiten_advantages=scope, whiten_ddof=ddof)
    empty = (jnp.zeros((), jnp.int32), jnp.zeros((4, 2, 4)), jnp.zeros((4, 2, 4), bool))
    batch = table_batch().replace(value_mask=np.ones((ROWS, 4), bool))
    (count, advantages, masks), _ = jax.jit(lambda batch: update(spying_step, empty, batch, KEY, config))(batch)
    assert int(count) == 4
    for numbers, mask in zip(np.asarray(advantages), np.asarray(masks), strict=True):
        counted = numbers[mask]
        near = abs(counted.mean()) < 1e-5 and abs(counted.std(ddof=ddof) - 1) < 1e-3
        assert near == whitened and (numbers[~mask] == 0).all()


def test_a_bad_reward_stops_in_its_minibatch_and_says_so():
    batch = table_batch()
    poisoned = batch.replace(advantages=np.where(np.arange(ROWS)[:, None] == 0, np.float32(np.inf), batch.advantages))
    config = PPOConfig(epochs=1, minibatches=1)
    optimizer = learn.make_optimizer(OptimizerConfig(learning_rate=0.1), 1)
    step = learn.make_train_step(make_ppo_loss(table_policy, config), optimizer)
    state = learn.initial_state(jax.tree.map(jnp.asarray, TABLE), optimizer, KEY)
    state, metrics = jax.jit(lambda batch: update(step, state, batch, KEY, config))(poisoned)
    assert not np.isfinite(metrics["loss"].value())
    np.testing.assert_array_equal(state.params["policy"]["logits"], TABLE["policy"]["logits"])


def test_the_guards_stop_beyond_their_limit_and_on_nan():
    """Both limits are 1e-3 nats. None: nothing was counted. NaN compares false with everything and is not below a limit."""
    config = PPOConfig()
    for guard, name in (
        (learn.stop_if_sampler_differs, "max_sampler_gap"),
        (learn.stop_if_not_identity, "max_identity_gap"),
    ):
        for fine in (None, 0.0, 0.9e-3):
            guard(3, fine, config)
        for bad in (1.1e-3, float("inf"), float("nan")):
            with pytest.raises(RunStopped, match=f"step 3: .*limit PPOConfig.{name} = 0.001"):
                guard(3, bad, config)


def test_every_field_of_the_configuration_is_known_here():
    """A new field needs its test; the others are in test_ppo_prepare.py, test_off_policy.py or guards of train_ppo."""
    local = {
        "epochs",
        "minibatches",
        "clip_low",
        "clip_high",
        "dual_clip",
        "value_clip",
        "value_coefficient",
        "entropy_coefficient",
    }
    place = {
        "discount", "lam", "kl_coefficient", "kl_kind", "biased_kl", "kl_target", "kl_horizon", "terminal",
        "missing_eos_penalty", "missing_eos", "whiten_rewards", "whiten_advantages", "whiten_ddof",
        "score_clip", "max_sampler_gap", "max_identity_gap",
        "max_kl", "old_logprobs", "importance",
    }  # fmt: skip
    assert {field.name for field in dataclasses.fields(PPOConfig)} == local | place

"""Reading finished text: which column each number comes from, and that padding says nothing."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import ops
from rlhf_jax.algorithms.scoring import policy_and_values, score
from rlhf_jax.errors import InputError
from rlhf_jax.models import Model, as_token_batch, sequence_logprobs, sequence_scores
from rlhf_jax.testing import completions, prompt_batch, random_params, tiny_model, token_batch

POLICY, POLICY_PARAMS = tiny_model("lm")
SLICED = Model(POLICY.config.replace(logits_chunk=3))
CRITIC, CRITIC_PARAMS = tiny_model("scalar", seed=3)
ROWS = [([5, 6, 7], [20, 21, 2]), ([8], [22, 23, 24, 25, 26]), ([9, 10], [2])]
WIDTH, LENGTH = 4, 5
TEMPERATURE = 0.7
FOUR = {"policy": POLICY, "value": CRITIC, "reference": POLICY, "reward": CRITIC}
TWO = {"policy": POLICY, "value": CRITIC, "reference": POLICY}
BOTH_PARAMS = {
    "policy": POLICY_PARAMS,
    "value": CRITIC_PARAMS,
    "reference": POLICY_PARAMS,
    "reward": CRITIC_PARAMS,
}
TWO_PARAMS = {role: BOTH_PARAMS[role] for role in TWO}


def made_completions(pad_id=0, garbage=None):
    """Completions of ROWS; garbage: a seed for random tokens in all padding."""
    prompts = prompt_batch([row[0] for row in ROWS], width=WIDTH, pad_id=pad_id)
    created = completions(prompts, [row[1] for row in ROWS], length=LENGTH, pad_id=pad_id)
    if garbage is None:
        return created
    rng = np.random.default_rng(garbage)
    prompts = prompts.replace(
        tokens=np.where(prompts.mask, prompts.tokens, rng.integers(0, 64, (3, WIDTH))).astype(np.int32)
    )
    tokens = np.where(created.mask, created.tokens, rng.integers(0, 64, (3, LENGTH))).astype(np.int32)
    return created.replace(prompts=prompts, tokens=tokens)


@functools.partial(jax.jit, static_argnums=0)
def scalars(model, params, tokens):
    return model.scalars(params, model.hidden(params, tokens))


@functools.partial(jax.jit, static_argnums=0)
def logits(model, params, tokens):
    return model.apply(params, tokens)


def read(models, params, created):
    call = functools.partial(policy_and_values, models, temperature=TEMPERATURE)
    return jax.jit(call)({role: params[role] for role in models if role in params}, created)


def scored(models, params, created):
    return jax.jit(functools.partial(score, models, temperature=TEMPERATURE))(params, created)


@functools.partial(jax.jit, static_argnums=0)
def scores(model, params, batch):
    return sequence_scores(model, params, batch)


def alone(row: int) -> np.ndarray:
    """The text of a row without any padding, [1, S]; right-padded to one length so that it compiles once."""
    prompt, response = ROWS[row]
    return np.int32([[*prompt, *response, *[0] * (9 - len(prompt) - len(response))]])


def test_prompt_and_response_become_one_sequence():
    batch = as_token_batch(made_completions())
    assert batch.tokens.tolist()[0] == [0, 5, 6, 7, 20, 21, 2, 0, 0]
    assert batch.segment_ids.tolist()[0] == [0, 1, 1, 1, 1, 1, 1, 0, 0]
    assert batch.positions.tolist()[0][1:7] == [0, 1, 2, 3, 4, 5]
    assert batch.loss_mask.tolist()[0] == [False] * 4 + [True] * 3 + [False] * 2
    assert batch.positions.tolist()[1][3:] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("shared", [False, True])
def test_values_are_read_before_their_token(shared):
    """V_t is the scalar at the token before t: at t itself it would have seen the action."""
    if shared:
        model, params = tiny_model("lm+scalar", seed=3)
        models, settings = {"policy": model}, {"policy": params}
    else:
        model, params = CRITIC, CRITIC_PARAMS
        models, settings = TWO, TWO_PARAMS
    logprobs, entropy, values = read(models, settings, made_completions())
    assert logprobs.shape == entropy.shape == values.shape == (3, LENGTH) and values.dtype == jnp.float32
    for row, (prompt, response) in enumerate(ROWS):
        exact = np.asarray(scalars(model, params, alone(row)))[0]
        for t in range(LENGTH):
            before = len(prompt) - 1 + min(t, len(response))  # after the end: what the end token says, repeated
            np.testing.assert_allclose(values[row, t], exact[before], atol=1e-5)


def test_the_critic_made_of_the_reward_model_agrees_with_it():
    """Value behind the last token = reward of the text, where a column is left to read it."""
    _, _, values = read(TWO, TWO_PARAMS, made_completions())
    rewards = scores(CRITIC, CRITIC_PARAMS, as_token_batch(made_completions()))
    np.testing.assert_allclose(values[0, 3], rewards[0], atol=1e-6)
    np.testing.assert_allclose(values[2, 1], rewards[2], atol=1e-6)


def test_log_probabilities_and_entropy_at_the_temperature():
    logprobs, entropy, _ = read(TWO, TWO_PARAMS, made_completions())
    for row, (prompt, response) in enumerate(ROWS):
        exact = logits(POLICY, POLICY_PARAMS, alone(row))[0].astype(jnp.float32)
        at = exact[len(prompt) - 1 : len(prompt) - 1 + len(response)]
        np.testing.assert_allclose(
            logprobs[row, : len(response)], ops.token_logprobs(at, jnp.array(response), TEMPERATURE), atol=1e-5
        )
        np.testing.assert_allclose(entropy[row, : len(response)], ops.entropy_from_logits(at, TEMPERATURE), atol=1e-5)
        assert (logprobs[row, len(response) :] == 0).all() and (entropy[row, len(response) :] == 0).all()


def test_a_policy_that_is_its_reference_has_no_divergence():
    """Exactly 0 at temperature .7: both sides run one definition; a temperature on one side only fails."""
    rollout = scored(TWO, TWO_PARAMS, made_completions())
    np.testing.assert_array_equal(rollout.logprobs, rollout.ref_logprobs)
    assert rollout.scores == {}  # no reward model: the score comes from elsewhere
    other = random_params(POLICY, 1)
    moved = scored(TWO, TWO_PARAMS | {"reference": other}, made_completions())
    np.testing.assert_array_equal(moved.logprobs, rollout.logprobs)
    assert np.abs(moved.ref_logprobs - rollout.ref_logprobs).max() > 0.1


def test_rewards_are_read_at_the_last_real_token():
    params = BOTH_PARAMS
    rollout = scored(FOUR, params, made_completions())
    for row, (prompt, response) in enumerate(ROWS):
        exact = np.asarray(scalars(CRITIC, CRITIC_PARAMS, alone(row)))[0, len(prompt) + len(response) - 1]
        np.testing.assert_allclose(rollout.scores["reward"][row], exact, atol=1e-5)
    # pad = end token: still the end token that was sampled, not the one before it and not the last column
    np.testing.assert_allclose(
        scored(FOUR, params, made_completions(pad_id=2)).scores["reward"], rollout.scores["reward"], atol=1e-6
    )


def test_left_padded_parts_score_like_right_padded_text():
    """The rollout's layout and the reward model's training layout give one number (N+ checks this to 1e-2)."""
    joined = token_batch([prompt + response for prompt, response in ROWS], length=WIDTH + LENGTH)
    expected = scores(CRITIC, CRITIC_PARAMS, joined)
    np.testing.assert_allclose(scores(CRITIC, CRITIC_PARAMS, as_token_batch(made_completions())), expected, atol=1e-5)
    assert np.ptp(expected) > 0.1


def test_a_row_of_padding_scores_zero():
    batch = token_batch([[5, 6], [], [7]], length=WIDTH + LENGTH)
    actual = scores(CRITIC, CRITIC_PARAMS, batch)
    assert actual[1] == 0.0 and (actual[jnp.array([0, 2])] != 0.0).all()


def test_garbage_in_padding_changes_nothing():
    """Bit for bit, values after the end included: with "last_column" they are counted."""
    params = BOTH_PARAMS | {"reference": random_params(POLICY, 1)}
    clean, dirty = (scored(FOUR, params, created) for created in (made_completions(), made_completions(garbage=0)))
    assert (np.asarray(clean.completions.tokens) != dirty.completions.tokens).any()
    for name in ("logprobs", "ref_logprobs", "values"):
        assert np.isfinite(getattr(clean, name)).all()
        np.testing.assert_array_equal(getattr(clean, name), getattr(dirty, name), err_msg=name)
    assert np.isfinite(clean.scores["reward"]).all()
    np.testing.assert_array_equal(clean.scores["reward"], dirty.scores["reward"])


def test_token_log_probabilities_sit_at_their_own_column():
    batch = token_batch([[5, 6, 7, 8, 9], [10, 11, 12]], length=9, prompt_lengths=[2, 1])
    logprobs, entropy = jax.jit(lambda b: sequence_logprobs(SLICED, POLICY_PARAMS, b))(batch)
    exact = logits(POLICY, POLICY_PARAMS, np.int32([[5, 6, 7, 8, 9, 0, 0, 0, 0]]))[0]
    np.testing.assert_allclose(logprobs[0, 2:5], ops.token_logprobs(exact[1:4], jnp.array([7, 8, 9])), atol=1e-5)
    np.testing.assert_allclose(entropy[0, 2:5], ops.entropy_from_logits(exact[1:4]), atol=1e-5)
    np.testing.assert_array_equal(np.asarray(logprobs) != 0, batch.loss_mask)
    whole, _ = jax.jit(lambda b: sequence_logprobs(POLICY, POLICY_PARAMS, b))(batch)
    np.testing.assert_allclose(whole, logprobs, atol=1e-6)


def test_a_missing_model_or_its_parameters_are_named():
    for role in FOUR:
        less = {name: model for name, model in FOUR.items() if name != role}
        settings = {name: BOTH_PARAMS[name] for name in less}
        for models, params in ((FOUR, settings), (less, BOTH_PARAMS)):
            with pytest.raises(InputError, match=f"both the model and the parameters of the role '{role}'"):
                score(models, params, made_completions(), temperature=1.0)
    with pytest.raises(InputError, match=r"params\['value'\]"):
        policy_and_values(TWO, {"policy": POLICY_PARAMS}, made_completions(), temperature=1.0)


def test_the_samplers_own_logprobs_save_the_policys_pass():
    """One pass of four less in the compiled program (each of the three left is of the same trunk); nothing else changes."""
    created = made_completions()
    created = created.replace(logprobs=np.where(created.mask, -0.25, 0.0).astype(np.float32))
    four = BOTH_PARAMS

    def run(sampler_logprobs):
        read = functools.partial(score, FOUR, temperature=TEMPERATURE, sampler_logprobs=sampler_logprobs)
        program = jax.jit(read).lower(four, created).compile()
        return program(four, created), program.cost_analysis()["flops"]

    (again, more), (own, less) = run(False), run(True)
    np.testing.assert_array_equal(own.logprobs, created.logprobs)
    assert np.abs(again.logprobs - created.logprobs).max() > 0.1
    for name in ("ref_logprobs", "values"):
        np.testing.assert_allclose(getattr(own, name), getattr(again, name), atol=1e-6)
    np.testing.assert_allclose(own.scores["reward"], again.scores["reward"], atol=1e-6)
    assert less < 0.8 * more

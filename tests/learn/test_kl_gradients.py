"""The gradient of a KL to the reference, by enumerating every outcome of a bandit through the public functions.

A mean over rows in which each outcome is as frequent as it is probable is an expectation, exactly. The true gradient is
that of E[score] - beta KL(policy || reference), in float64 from the definition.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import learn
from rlhf_jax.errors import InputError
from rlhf_jax.learn import GRPOConfig, PPOConfig
from rlhf_jax.testing import completions, prompt_batch
from rlhf_jax.types import Rollout

KEY = jax.random.key(0)
BETA = 0.4
TWO = (np.array([0.7, 0.3]), np.array([0.5, 0.5]), np.array([1.0, -0.5]))
THREE = (np.array([0.2, 0.5, 0.3]), np.array([0.4, 0.4, 0.2]), np.array([1.0, -0.5, 2.0]))
"""Policy, reference, score of each arm; probabilities are tenths."""


def true_gradient(policy: np.ndarray, reference: np.ndarray, scores: np.ndarray, beta: float = BETA) -> np.ndarray:
    """In the logits: p_i (f_i - sum p f) with f = score - beta log(p / q); the constant of d log p drops out."""
    gain = np.zeros(len(policy))
    for arm, p in enumerate(policy):
        worth = scores[arm] - beta * np.log(p / reference[arm])
        for logit in range(len(policy)):
            gain[logit] += p * worth * ((arm == logit) - policy[logit])
    return gain


def rollout(arms: list[int], sampled: np.ndarray, reference: np.ndarray, scores: np.ndarray) -> Rollout:
    """Responses of one token, the arm."""
    rows = len(arms)
    prompts = prompt_batch([[1]] * rows, prompt_ids=[0] * rows, sample_ids=range(rows))
    logs, anchor = (np.log(p)[arms][:, None].astype(np.float32) for p in (sampled, reference))
    outcome = completions(prompts, [[3 + arm] for arm in arms], length=1, eos_ids=(3, 4, 5), logprobs=logs)
    return Rollout(
        outcome, logs, anchor, np.zeros((rows, 1), np.float32), {"gold": np.float32(scores[arms])}, np.ones(rows, bool)
    )


def logprobs(params, completions):
    return jax.nn.log_softmax(params["logits"])[completions.tokens - 3], jnp.zeros(completions.tokens.shape)


def descent(loss, policy: np.ndarray, batch) -> np.ndarray:
    """Minus the gradient of the loss: the direction in which the update moves the logits."""
    params = {"logits": jnp.log(jnp.float32(policy))}
    return -np.asarray(learn.gradients(loss, params, {}, batch, KEY, 1)[0]["logits"])


def ppo_direction(policy, reference, scores, **fields) -> np.ndarray:
    config = PPOConfig(missing_eos_penalty=None, whiten_advantages="none", lam=1.0, **fields)
    arms = [arm for arm, p in enumerate(policy) for _ in range(round(10 * p))]
    batch, _ = learn.prepare(rollout(arms, policy, reference, scores), config, BETA)
    loss = learn.make_ppo_loss(
        lambda p, completions: (*logprobs(p, completions), jnp.zeros(completions.tokens.shape)), config
    )
    return descent(loss, policy, batch)


def rloo_direction(policy, reference, scores, **fields) -> np.ndarray:
    """Groups of two: every ordered pair of ten equally likely draws."""
    config = GRPOConfig(advantages="leave_one_out", kl_in="reward", kl_coefficient=BETA, **fields)
    draws = [arm for arm, p in enumerate(policy) for _ in range(round(10 * p))]
    arms = [arm for pair in itertools.product(draws, repeat=2) for arm in pair]
    batch, _ = learn.prepare_groups(rollout(arms, policy, reference, scores), config, 2)
    return descent(learn.make_grpo_loss(logprobs, config), policy, batch)


def kl_loss_direction(policy, sampler, reference, kind) -> np.ndarray:
    """Of the KL term alone: all scores are the same, so the advantages are 0. ``sampler`` drew the responses."""
    config = GRPOConfig(kl_coefficient=1.0, kl_kind=kind, biased_kl=kind == "k1")
    arms = [arm for arm, p in enumerate(sampler) for _ in range(round(10 * p))]
    batch, _ = learn.prepare_groups(rollout(arms, sampler, reference, np.zeros(len(policy))), config, 10)
    return descent(learn.make_grpo_loss(logprobs, config), policy, batch)


@pytest.mark.parametrize("direction", [ppo_direction, rloo_direction])
@pytest.mark.parametrize("bandit", [TWO, THREE])
def test_the_surrogate_has_the_true_gradient(bandit, direction):
    np.testing.assert_allclose(direction(*bandit), true_gradient(*bandit), atol=1e-6)


@pytest.mark.parametrize("direction", [ppo_direction, rloo_direction])
@pytest.mark.parametrize(("kind", "towards"), [("k1", -0.177933), ("k2", 0.015512), ("k3", 0.022067)])
def test_only_k1_in_the_reward_pulls_to_the_reference(kind, towards, direction):
    """Policy [.7, .3], reference [.5, .5], no score: the first logit must fall. It moves by -.21 (e(first) - e(second)),
    d = .336472 and -.510826: k1 -.21 x .847298 = -.177933; k2 -.21 (.056607 - .130472) = .015512; k3 -.21 (.050758 -
    .155841) = .022067: with these it rises, to [1, 0] in the end."""
    policy, reference, _ = TWO
    d = np.log(policy / reference)
    estimate = {"k1": d, "k2": d**2 / 2, "k3": np.exp(-d) - 1 + d}[kind]
    expected = -BETA * np.array([0.21, -0.21]) * (estimate[0] - estimate[1])
    actual = direction(policy, reference, np.zeros(2), kl_kind=kind, biased_kl=True)
    np.testing.assert_allclose(actual, expected, atol=1e-6)
    assert actual[0] / BETA == pytest.approx(towards, abs=1e-5)


@pytest.mark.parametrize("bandit", [TWO, THREE])
@pytest.mark.parametrize("stale", [False, True])
def test_weighted_k3_in_the_loss_has_the_true_gradient(bandit, stale):
    """Also when an older policy sampled: the weight makes its responses the present policy's."""
    policy, reference, scores = bandit
    sampler = np.roll(policy, 1) if stale else policy
    expected = true_gradient(policy, reference, 0 * scores, 1.0)
    np.testing.assert_allclose(kl_loss_direction(policy, sampler, reference, None), expected, atol=1e-6)
    np.testing.assert_allclose(kl_loss_direction(policy, sampler, reference, "weighted_k3"), expected, atol=1e-6)


@pytest.mark.parametrize(("kind", "first"), [("k1", 0.0), ("k2", -0.177933), ("k3", -0.2)])
def test_other_kinds_in_the_loss(kind, first):
    """k1 holds nothing; k2 is right while the policy is the sampler; k3 has the forward divergence's, p - q = .2."""
    policy, reference, _ = TWO
    actual = kl_loss_direction(policy, policy, reference, kind)
    np.testing.assert_allclose(actual, [first, -first], atol=1e-6)


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (
            PPOConfig,
            {"kl_kind": "k3"},
            "PPOConfig.kl_kind = 'k3': in a reward .* away from the reference; use 'k1', or",
        ),
        (PPOConfig, {"kl_kind": "k2"}, "set PPOConfig.biased_kl = True"),
        (PPOConfig, {"kl_kind": "weighted_k3", "biased_kl": True}, "PPOConfig.kl_kind = 'weighted_k3': one of 'k1'"),
        (GRPOConfig, {"kl_kind": "k3", "kl_in": "reward"}, "GRPOConfig.kl_kind = 'k3': in a reward"),
        (GRPOConfig, {"kl_kind": "k1"}, "GRPOConfig.kl_kind = 'k1': in a loss its expected gradient is 0"),
        (GRPOConfig, {"kl_kind": ""}, "GRPOConfig.kl_kind = '': one of"),
        (GRPOConfig, {"biased_kl": 1.5}, "GRPOConfig.biased_kl = 1.5: one of True, False"),
    ],
)
def test_an_estimator_in_the_wrong_place_is_refused(config, fields, message):
    with pytest.raises(InputError, match=message):
        config(**fields)


def test_the_default_kind_follows_the_place():
    assert GRPOConfig().kl_estimator == "weighted_k3"
    assert GRPOConfig(kl_in="reward").kl_estimator == "k1" == PPOConfig().kl_kind
    assert GRPOConfig(kl_kind="k3", kl_in="reward", biased_kl=True).kl_estimator == "k3"

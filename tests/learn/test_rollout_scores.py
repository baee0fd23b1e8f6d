"""Scores of models and texts join into one rollout; rewards at single tokens count beside them."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.learn import GRPOConfig, PPOConfig, prepare, prepare_groups
from rlhf_jax.testing import completions, prompt_batch
from rlhf_jax.types import Rollout, Scored

PLAIN = PPOConfig(whiten_advantages="none", missing_eos_penalty=None, kl_coefficient=0.0, lam=1.0)


def scored(**scores: list[float]) -> Scored:
    """Two responses of two tokens, ended; log-probabilities and values 0."""
    outcome = completions(prompt_batch([[5], [5]]), [[7, 2], [8, 2]], length=3)
    zeros = np.zeros((2, 3), np.float32)
    return Scored(outcome, zeros, zeros, zeros, {name: np.float32(values) for name, values in scores.items()})


def test_scores_of_models_and_texts_are_summed() -> None:
    rollout = Rollout.of(scored(reward=[1.0, 2.0]), {"gold": jnp.float32([10.0, 20.0])})
    assert sorted(rollout.scores) == ["gold", "reward"]
    assert rollout.score.tolist() == [11.0, 22.0] and rollout.scored.tolist() == [True, True]
    some = Rollout.of(scored(reward=[1.0, 2.0]), {}, jnp.array([True, False]))
    assert some.score.tolist() == [1.0, 2.0] and some.scored.tolist() == [True, False]


def test_a_name_on_both_sides_and_no_score_are_refused() -> None:
    with pytest.raises(InputError, match="both give the score 'reward'; rename one"):
        Rollout.of(scored(reward=[1.0, 2.0]), {"reward": jnp.zeros(2)})
    with pytest.raises(InputError, match="nothing gives a score"):
        Rollout.of(scored(), {})


def test_token_rewards_reach_the_shaped_rewards_of_ppo() -> None:
    """Without discount the return at a token is what is paid from there on: score 1 at the end, .5 at the first token."""
    paid = np.float32([[0.5, 0.0, 9.0], [0.0, 0.0, 9.0]])  # what lies behind the end is not paid
    rollout = dataclasses.replace(Rollout.of(scored(reward=[1.0, 2.0]), {}), token_rewards=paid)
    batch, metrics = prepare(rollout, PLAIN, jnp.asarray(0.0))
    np.testing.assert_allclose(batch.returns[:, :2], [[1.5, 1.0], [2.0, 2.0]], atol=1e-6)
    assert float(metrics["score_shaped"].value()) == pytest.approx((1.5 + 2.0) / 2)


def test_token_rewards_reach_the_scores_of_a_group() -> None:
    """Scores 1 and 2, of which the bound leaves 1 and 1; 3 more at a token of the first: 4 and 1, 1.5 from their mean."""
    paid = np.float32([[1.0, 2.0, 9.0], [0.0, 0.0, 9.0]])
    rollout = dataclasses.replace(Rollout.of(scored(reward=[1.0, 2.0]), {}), token_rewards=paid)
    batch, _ = prepare_groups(rollout, GRPOConfig(advantages="centred", score_clip=1.0), 2)
    np.testing.assert_allclose(batch.advantages, [1.5, -1.5], atol=1e-6)

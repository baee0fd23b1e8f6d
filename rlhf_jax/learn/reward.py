"""Reward modelling from pairwise comparisons (Bradley-Terry)."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from rlhf_jax import ops
from rlhf_jax.batches import PairBatch, TokenBatch
from rlhf_jax.errors import require_number
from rlhf_jax.types import LossFn, Mean, Params, Rng, Term

ScoreFn = Callable[[Params, TokenBatch], Array]
"""(params, batch) -> the reward of each row, read at its last real token, float32 [B]."""


def pair_scores(score_fn: ScoreFn, params: Params, batch: PairBatch) -> tuple[Array, Array]:
    """(chosen, rejected) rewards, float32 [B] each, from one forward pass over both sides."""
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), batch.chosen, batch.rejected)
    scores = score_fn(params, both)
    half = scores.shape[0] // 2
    return scores[:half], scores[half:]


def pair_mask(batch: PairBatch) -> Array:
    """bool [B]: False for rows that only fill up a batch."""
    return (batch.chosen.segment_ids > 0).any(axis=1)


def reward_terms(chosen: Array, rejected: Array, batch: PairBatch, centring: float) -> dict[str, Term]:
    """Sum the loss of `make_reward_loss` from rewards, float32 [B] each."""
    counts = pair_mask(batch)
    nll = Mean.of(ops.pairwise_loss(chosen, rejected, batch.margin), counts)
    terms = {"pairwise": Term(nll.total, nll.weight)}
    if centring:
        penalty = Mean.of(ops.centring_penalty(chosen, rejected), counts)
        terms["centring"] = Term(penalty.total, penalty.weight, centring)
    return terms


def make_reward_loss(score_fn: ScoreFn, *, centring: float = 0.0) -> LossFn:
    """Mean over pairs of ``-log sigmoid(chosen - rejected - margin)``, plus ``centring`` times the mean of (chosen +
    rejected)^2. Metrics: accuracy (ties count as wrong), reward_gap, reward_chosen, reward_rejected."""

    require_number("make_reward_loss: centring", centring, 0.0)

    def loss(params: Params, frozen: Params, batch: PairBatch, rng: Rng) -> tuple[dict[str, Term], dict[str, Mean]]:
        del frozen, rng
        chosen, rejected = pair_scores(score_fn, params, batch)
        counts = pair_mask(batch)
        terms = reward_terms(chosen, rejected, batch, centring)
        metrics = {
            "accuracy": Mean.of(chosen > rejected, counts),
            "reward_gap": Mean.of(chosen - rejected, counts),
            "reward_chosen": Mean.of(chosen, counts),
            "reward_rejected": Mean.of(rejected, counts),
        }
        return terms, metrics

    return loss

"""Reward modelling from pairwise comparisons (Bradley-Terry)."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Array

from rlhf_jax import ops
from rlhf_jax.batches import RankedBatch, TokenBatch
from rlhf_jax.errors import require_number
from rlhf_jax.learn.ranked import pair_halves, pair_mask, pair_mean, pair_rows
from rlhf_jax.types import LossFn, Mean, Params, Rng, Term

ScoreFn = Callable[[Params, TokenBatch], Array]
"""(params, batch) -> the reward of each row, read at its last real token, float32 [B]."""


def pair_scores(score_fn: ScoreFn, params: Params, batch: RankedBatch) -> tuple[Array, Array]:
    """Return (chosen, rejected) rewards, float32 [B] each, from one forward pass over both sides."""
    return pair_halves(score_fn(params, pair_rows(batch)))


def reward_terms(chosen: Array, rejected: Array, batch: RankedBatch, centring: float) -> dict[str, Term]:
    """Sum the loss of `make_reward_loss` from rewards, float32 [B] each."""
    nll = pair_mean(ops.pairwise_loss(chosen, rejected, batch.margin), batch)
    terms = {"pairwise": Term(nll.total, nll.weight)}
    if centring:
        penalty = pair_mean(ops.centring_penalty(chosen, rejected), batch)
        terms["centring"] = Term(penalty.total, penalty.weight, centring)
    return terms


def make_reward_loss(score_fn: ScoreFn, *, centring: float = 0.0) -> LossFn:
    """Make the loss: the mean over pairs of ``-log sigmoid(chosen - rejected - margin)``, plus a centring penalty.

    The penalty is ``centring`` times the mean of (chosen + rejected)^2. Both are weighted by pair. Metrics, every pair alike:
    accuracy (ties count as wrong), reward_gap, reward_chosen, reward_rejected.
    """

    require_number("make_reward_loss: centring", centring, 0.0)

    def loss(params: Params, frozen: Params, batch: RankedBatch, rng: Rng) -> tuple[dict[str, Term], dict[str, Mean]]:
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

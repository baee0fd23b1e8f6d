"""Supervised fine-tuning: cross-entropy of the target tokens."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Array

from rlhf_jax.types import LossFn, Mean, Params, Rng, Term, TokenBatch

LogprobsFn = Callable[[Params, TokenBatch], tuple[Array, Array]]
"""(params, batch) -> (log-probability of the token AT each column given those before it, entropy), float32 [B, S].
Column 0 has none and is 0."""


def make_sft_loss(logprobs_fn: LogprobsFn) -> LossFn:
    """``-sum(mask * logprob) / sum(mask)`` over the whole optimiser step. Metrics: entropy; tokens_per_row, target tokens
    of a row (a mean: a count would depend on how the step is cut into microbatches)."""

    def loss(params: Params, frozen: Params, batch: TokenBatch, rng: Rng) -> tuple[dict[str, Term], dict[str, Mean]]:
        del frozen, rng
        logprobs, entropy = logprobs_fn(params, batch)
        nll = Mean.of(-logprobs, batch.loss_mask)
        metrics = {
            "entropy": Mean.of(entropy, batch.loss_mask),
            "tokens_per_row": Mean.of(batch.loss_mask.sum(axis=1)),
        }
        return {"nll": Term(nll.total, nll.weight)}, metrics

    return loss

"""Supervised fine-tuning: cross-entropy of the target tokens."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array

from rlhf_jax.batches import TokenBatch
from rlhf_jax.types import LossFn, Mean, Params, Rng, Term

LogprobsFn = Callable[[Params, TokenBatch], tuple[Array, ...]]
"""(params, batch) -> (log-probability of the token AT each column given those before it, entropy), float32 [B, S].
Column 0 has none and is 0. A model with experts may add the loss of its routers, float32 []."""


def make_sft_loss(logprobs_fn: LogprobsFn) -> LossFn:
    """Make the loss ``-sum(mask * logprob) / sum(mask)`` over the whole optimizer step.

    Metrics: entropy; tokens_per_row, target tokens of a row (a mean, because a count would depend on the number of microbatches).
    The loss of routers, where there are some, is a mean over microbatches weighted by their tokens: loads are balanced within
    each.
    """

    def loss(params: Params, frozen: Params, batch: TokenBatch, rng: Rng) -> tuple[dict[str, Term], dict[str, Mean]]:
        del frozen, rng
        logprobs, entropy, *router = logprobs_fn(params, batch)
        nll = Mean.of(-logprobs, batch.loss_mask)
        metrics = {
            "entropy": Mean.of(entropy, batch.loss_mask),
            "tokens_per_row": Mean.of(batch.loss_mask.sum(axis=1)),
        }
        terms = {"nll": Term(nll.total, nll.weight)}
        if router:
            tokens = (batch.segment_ids > 0).sum().astype(jnp.float32)
            terms["router"] = Term(router[0] * tokens, tokens)
        return terms, metrics

    return loss

"""Fine-tuning with an anchor: cross-entropy, and a penalty on the distance to the parameters at the start."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from rlhf_jax.batches import TokenBatch
from rlhf_jax.errors import require_number
from rlhf_jax.learn.sft import LogprobsFn
from rlhf_jax.types import LossFn, Mean, Params, Rng, Term


@dataclasses.dataclass(frozen=True)
class AnchorConfig:
    """strength: weight of the mean squared distance of a parameter to where it started, >= 0."""

    strength: float = 1.0

    def __post_init__(self) -> None:
        require_number("AnchorConfig.strength", self.strength, 0.0)


def distance(params: Params, anchor: Params) -> Mean:
    """Return the mean squared distance of the parameters to the anchor, float32.

    Example: if two parameters differ by 1 and 3, it is (1 + 9) / 2 = 5.
    """
    squares = jax.tree.map(lambda x, y: jnp.square(x.astype(jnp.float32) - y).sum(), params, anchor)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    return Mean(jnp.stack(jax.tree.leaves(squares)).sum(), jnp.asarray(count, jnp.float32))


def make_anchor_loss(logprobs_fn: LogprobsFn, config: AnchorConfig) -> LossFn:
    """Return the loss of anchored fine-tuning: mean negative log-likelihood per target token + strength * `distance`."""

    def loss(params: Params, frozen: Params, batch: TokenBatch, rng: Rng) -> tuple[dict[str, Term], dict[str, Mean]]:
        del rng
        nll = Mean.of(-logprobs_fn(params, batch)[0], batch.loss_mask)
        # The weight of a term is summed over microbatches: a number that is the same in each of them is counted once in each.
        moved = distance(params, frozen["anchor"])
        terms = {
            "nll": Term(nll.total, nll.weight),
            "anchor": Term(moved.total, moved.weight, config.strength),
        }
        return terms, {"distance": moved}

    return loss

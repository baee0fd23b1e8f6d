"""The pytrees and function types that flow between packages; `batches` are registered as pytrees here.

Every package that uses jax may import this module. Letters in shapes: ``B`` rows of a batch, ``P`` prompt
columns (left-padded), ``T`` response columns (right-padded), ``S`` columns of a whole sequence, ``V`` vocabulary.
Masks are boolean and True means *counts*. Losses, log-probabilities, rewards, values and advantages are float32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int32

from rlhf_jax.batches import PromptBatch, RankedBatch, TokenBatch
from rlhf_jax.errors import InputError

Params = dict[str, Any]
"""A plain nested dict of arrays with string keys."""
Rng = jax.Array
"""A typed ``threefry2x32`` key (``jax.random.key``)."""


for _batch in (TokenBatch, RankedBatch, PromptBatch):
    jax.tree_util.register_dataclass(
        _batch, data_fields=[field.name for field in dataclasses.fields(_batch)], meta_fields=[]
    )


@struct.dataclass
class Mean:
    """A mean that merges by addition: ``value = total / weight``. Never average two of them: add them.

    total: float32 [], the sum over the items that count. weight: float32 [], how many items count.
    """

    total: Float[Array, ""]
    weight: Float[Array, ""]

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.weight + other.weight)

    @classmethod
    def of(cls, values: Array, mask: Array | None = None) -> Mean:
        """Return the mean of ``values`` over True entries of ``mask`` (all entries when None). Raises InputError for a mask that
        is not boolean; numbers that say how much an item counts go to `weighted`."""
        values = values.astype(jnp.float32)
        if mask is None:
            return cls(values.sum(), jnp.asarray(values.size, jnp.float32))
        _require_booleans("Mean.of", mask)
        counted = jnp.broadcast_to(mask, values.shape)
        return cls(jnp.where(counted, values, 0.0).sum(), counted.sum().astype(jnp.float32))

    @classmethod
    def weighted(cls, values: Array, mask: Array, weight: Array) -> Mean:
        """Return the mean of ``values`` over True entries of ``mask`` in which an item counts ``weight`` times: values 1 and 4 with
        weights 3 and 1 give 7 / 4. mask, weight: of the shape of values, or broadcast to it. Values where the mask is False or the
        weight is 0 are not read. Raises InputError for a mask that is not boolean."""
        _require_booleans("Mean.weighted", mask)
        counts = jnp.broadcast_to(jnp.where(mask, weight, 0.0).astype(jnp.float32), values.shape)
        return cls(jnp.where(counts != 0, values.astype(jnp.float32) * counts, 0.0).sum(), counts.sum())

    def value(self) -> Float[Array, ""]:
        """Return ``total / weight``; NaN when the weight is 0."""
        return self.total / self.weight


def _require_booleans(name: str, mask: Array) -> None:
    if mask.dtype != jnp.bool_:
        raise InputError(f"{name}: mask of dtype {mask.dtype}: give booleans, True = counts")


@struct.dataclass
class Term:
    """One addend of a loss: ``coefficient * total / weight``, the weight taken over the WHOLE optimiser step.

    Keeping total and weight apart until every microbatch and device is summed is what makes gradient accumulation exact
    (mean of means is a bug many frameworks shipped: huggingface/transformers issue 34191).
    """

    total: Float[Array, ""]
    weight: Float[Array, ""]
    coefficient: float | Float[Array, ""] = 1.0


@struct.dataclass
class Completions:
    """Prompts with what was sampled after them; a sequence is ``concatenate([prompts.tokens, tokens], axis=1)``.

    tokens: int32 [B, T], pad id after the end. mask: bool [B, T], True through the first end-of-sequence token, included.
    logprobs: float32 [B, T], log-probability of each token under softmax(logits / temperature), 0 where not mask: what
    a scorer recomputes.
    ended: bool [B], True when the response ended by itself (stop token, stop string; False: cut at the length limit).
    sampled_logprobs: float32 [B, T], log-probability under the distribution that was drawn from: after penalties,
    forbidden tokens and truncation; equal to logprobs without those. None for completions that were not sampled.
    slot_steps: int32 [B], decode steps for which the row held its slot, those after its end included: mask.sum() /
    slot_steps.sum() is the share of the sampler's work that was of use. None likewise.
    """

    prompts: PromptBatch
    tokens: Int32[Array, "B T"]
    mask: Bool[Array, "B T"]
    logprobs: Float[Array, "B T"]
    ended: Bool[Array, "B"]  # noqa: F821
    sampled_logprobs: Float[Array, "B T"] | None = None
    slot_steps: Int32[Array, "B"] | None = None  # noqa: F821


@struct.dataclass
class Scored:
    """Completions with what the models say of them. Log-probabilities are 0 where ``completions.mask`` is False.

    logprobs: float32 [B, T], policy's, recomputed by the scorer (these are the "old" ones of the ratio).
    ref_logprobs: float32 [B, T], the frozen reference's, same temperature; None without a reference.
    values: float32 [B, T], value BEFORE emitting token t (read at sequence column P - 1 + t); after the end the value
    behind the last token is repeated; None without a value model.
    scores: {name: float32 [B]}, of reward models; {} without any.
    """

    completions: Completions
    logprobs: Float[Array, "B T"]
    ref_logprobs: Float[Array, "B T"] | None
    values: Float[Array, "B T"] | None
    scores: dict[str, Float[Array, "B"]]  # noqa: F821


@struct.dataclass
class Rollout:
    """Scored completions of an iteration: what `Scored` holds, and all that rewards say.

    scores: {name: float32 [B]}, the sequence's rewards before penalties and KL; their sum counts. The names are fixed before the
    first step. scored: bool [B], False for responses that could not be scored: they are left out of every mean and of the update.
    token_rewards: float32 [B, T], rewards at single tokens beside them; None without any.
    """

    completions: Completions
    logprobs: Float[Array, "B T"]
    ref_logprobs: Float[Array, "B T"] | None
    values: Float[Array, "B T"] | None
    scores: dict[str, Float[Array, "B"]]  # noqa: F821
    scored: Bool[Array, "B"]  # noqa: F821
    token_rewards: Float[Array, "B T"] | None = None

    @classmethod
    def of(
        cls,
        scored: Scored,
        scores: dict[str, Array],
        counts: Array | None = None,
        token_rewards: Array | None = None,
    ) -> Rollout:
        """Join what the models say with the scores of texts. counts: bool [B], responses that could be scored; None = all.

        Raises InputError for one name on both sides, and when nothing gives a score.
        """
        counts = jnp.ones(scored.completions.ended.shape, jnp.bool_) if counts is None else counts
        if twice := sorted(scored.scores.keys() & scores.keys()):
            raise InputError(f"Rollout.of: a model and a text reward both give the score {twice[0]!r}; rename one")
        joined = scored.scores | scores
        if not joined:
            raise InputError("Rollout.of: nothing gives a score; give a reward model or scores of texts")
        return cls(
            scored.completions, scored.logprobs, scored.ref_logprobs, scored.values, joined, counts, token_rewards
        )

    @property
    def score(self) -> Float[Array, "B"]:  # noqa: F821
        """The sum of all scores, float32 [B]."""
        total, *remaining = (self.scores[name].astype(jnp.float32) for name in sorted(self.scores))
        for other in remaining:
            total = total + other
        return total


@struct.dataclass
class PolicyBatch:
    """The batch of the PPO update: a rollout with its (already whitened) advantages. All float32 [B, T] constants.

    importance: weights of the policy loss, for samples that are not the scored policy's own; None = 1."""

    completions: Completions
    old_logprobs: Float[Array, "B T"]
    old_values: Float[Array, "B T"]
    advantages: Float[Array, "B T"]
    returns: Float[Array, "B T"]
    value_mask: Bool[Array, "B T"]
    importance: Float[Array, "B T"] | None = None


@struct.dataclass
class TrainState:
    """Arrays only, so that a checkpoint is plain data. step: int32 []. rng: the run's key; a step uses fold_in(rng, step)."""

    step: Int32[Array, ""]
    params: Params
    opt_state: Any
    rng: Rng


LossFn = Callable[[Params, Params, Any, Rng], tuple[dict[str, Term], dict[str, Mean]]]
"""(trainable, frozen, batch, rng) -> (terms of the loss, metrics)."""
PrepareFn = Callable[[Params, Params, Any, Rng], tuple[Any, dict[str, Mean]]]
"""(params, frozen, batch, rng) -> (batch, metrics): the stage of a step over its WHOLE batch, before microbatches are cut."""
TrainStep = Callable[[TrainState, Params, Any], tuple[TrainState, dict[str, Mean]]]
"""(state, frozen, batch) -> (state, metrics). Frozen arrays are arguments, never closed over."""

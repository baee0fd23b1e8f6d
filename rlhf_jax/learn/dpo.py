"""Direct preference optimisation: the policy itself learned from pairs, without a reward model (Rafailov et al. 2023)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from rlhf_jax import ops
from rlhf_jax.batches import RankedBatch, TokenBatch
from rlhf_jax.errors import InputError, require_number
from rlhf_jax.learn.ranked import pair_halves, pair_mask, pair_mean, pair_rows
from rlhf_jax.learn.sft import LogprobsFn
from rlhf_jax.types import LossFn, Mean, Params, Rng, Term

ReferenceFn = Callable[[Params, TokenBatch], Array]
"""(frozen, batch) -> the reference's log-probability of the token at each column, float32 [B, S]."""


@dataclasses.dataclass(frozen=True)
class DPOConfig:
    """DPO's own numbers; defaults as in TRL 1.16.0.

    beta: how strongly the policy is held to its reference. loss: "sigmoid", "robust", "hinge" or "ipo", see
    `ops.preference_loss`. label_smoothing: the share of labels taken to be flipped, in [0, 0.5) ("sigmoid" and "robust").
    average: log-probabilities per token instead of summed over the response (the form of IPO that TRL ships; the original
    losses sum). sft_coefficient: weight of the chosen responses' cross-entropy beside it (RPO, Pang et al. 2024), 0 = off.
    """

    beta: float = 0.1
    loss: ops.PreferenceKind = "sigmoid"
    label_smoothing: float = 0.0
    average: bool = False
    sft_coefficient: float = 0.0

    def __post_init__(self) -> None:
        if self.loss not in ops.PREFERENCE_KINDS:
            allowed = ", ".join(map(repr, ops.PREFERENCE_KINDS))
            raise InputError(f"DPOConfig.loss = {self.loss!r}: one of {allowed}")
        for name in ("beta", "label_smoothing", "sft_coefficient"):
            require_number(f"DPOConfig.{name}", getattr(self, name), 0.0)
        if not isinstance(self.average, bool):
            raise InputError(f"DPOConfig.average = {self.average!r}: True or False")
        if not 0 < self.beta < float("inf"):
            raise InputError(f"DPOConfig.beta = {self.beta!r}: give a number above 0")
        if not 0 <= self.label_smoothing < 0.5:
            raise InputError(f"DPOConfig.label_smoothing = {self.label_smoothing!r}: give a share in [0, 0.5)")
        if self.label_smoothing and self.loss not in ("sigmoid", "robust"):
            raise InputError(f"DPOConfig.label_smoothing: has no effect on loss = {self.loss!r}; remove it")
        if self.sft_coefficient == float("inf"):
            raise InputError("DPOConfig.sft_coefficient = inf: give a finite number")


def implicit_rewards(logprobs: Array, reference: Array, batch: TokenBatch, config: DPOConfig) -> Array:
    """Return ``beta (log pi - log reference)`` of the response of each row, float32 [B].

    Up to a constant of the prompt, this is the reward for which the policy is optimal (Rafailov et al. 2023, eq. 5). logprobs,
    reference: [B, S].
    """
    ops.require_same_shape("implicit_rewards", logprobs=logprobs, reference=reference, tokens=batch.tokens)
    return config.beta * _sum_over_response(
        ops.zero_outside(logprobs - reference, batch.loss_mask), batch.loss_mask, config
    )


def _sum_over_response(values: Array, mask: Array, config: DPOConfig) -> Array:
    """Sum over the columns of the response, [B, S] -> [B]."""
    return ops.masked_mean(values, mask, axis=1) if config.average else ops.masked_sum(values, mask, axis=1)


def make_dpo_terms(
    logprobs_fn: LogprobsFn, reference_fn: ReferenceFn, config: DPOConfig
) -> Callable[[Params, Params, RankedBatch], tuple[dict[str, Term], Array, Array]]:
    """Make the function (params, frozen, batch) -> (terms of `make_dpo_loss`, implicit rewards [2 B], log-probabilities [2 B,
    S]).

    Rows are the chosen responses, then the rejected ones.
    """

    def terms_of(params: Params, frozen: Params, batch: RankedBatch) -> tuple[dict[str, Term], Array, Array]:
        rows = pair_rows(batch)
        logprobs, _, *router = logprobs_fn(params, rows)
        reference = jax.lax.stop_gradient(reference_fn(frozen, rows))
        rewards = implicit_rewards(logprobs, reference, rows, config)
        chosen, rejected = pair_halves(rewards)
        losses = ops.preference_loss(
            (chosen - rejected) / config.beta,
            beta=config.beta,
            kind=config.loss,
            label_smoothing=config.label_smoothing,
        )
        preference = pair_mean(losses, batch)
        terms = {"preference": Term(preference.total, preference.weight)}
        if config.sft_coefficient:
            targets = batch.rows.loss_mask[:, 0] & pair_mask(batch)[:, None]
            nll = Mean.weighted(-pair_halves(logprobs)[0], targets, batch.weight[:, None])
            terms["nll"] = Term(nll.total, nll.weight, config.sft_coefficient)
        if router:
            tokens = (rows.segment_ids > 0).sum().astype(jnp.float32)
            terms["router"] = Term(router[0] * tokens, tokens)
        return terms, rewards, logprobs

    return terms_of


def make_dpo_loss(logprobs_fn: LogprobsFn, reference_fn: ReferenceFn, config: DPOConfig) -> LossFn:
    """Make the loss: the mean of `ops.preference_loss` over pairs, and a language-model term.

    The second term is ``sft_coefficient`` times the mean negative log-likelihood per token of the chosen responses. Both are
    weighted by pair. Both sides go through one forward pass.

    Metrics, every pair alike: accuracy (ties count as wrong), reward_gap, reward_chosen, reward_rejected of the implicit rewards,
    and logprob_chosen, logprob_rejected in nats per response; those of the chosen response fall too when beta is small.
    """
    terms_of = make_dpo_terms(logprobs_fn, reference_fn, config)

    def loss(params: Params, frozen: Params, batch: RankedBatch, rng: Rng) -> tuple[dict[str, Term], dict[str, Mean]]:
        del rng
        terms, rewards, logprobs = terms_of(params, frozen, batch)
        counts, (chosen, rejected) = pair_mask(batch), pair_halves(rewards)
        totals = pair_halves(ops.masked_sum(logprobs, pair_rows(batch).loss_mask, axis=1))
        metrics = {
            "accuracy": Mean.of(chosen > rejected, counts),
            "reward_gap": Mean.of(chosen - rejected, counts),
            "reward_chosen": Mean.of(chosen, counts),
            "reward_rejected": Mean.of(rejected, counts),
            "logprob_chosen": Mean.of(totals[0], counts),
            "logprob_rejected": Mean.of(totals[1], counts),
        }
        return terms, metrics

    return loss

"""GRPO and its relatives: the other samples of a prompt are the baseline, there is no value model (Shao et al. 2024)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal, get_args

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float

from rlhf_jax import ops
from rlhf_jax.errors import InputError, require_number, require_one_of, require_whole
from rlhf_jax.learn.epochs import run_epochs
from rlhf_jax.learn.importance import ImportanceConfig, check_double_counting, rollout_weights
from rlhf_jax.learn.kl import require_kl_kind
from rlhf_jax.learn.ppo import response_metrics, without_unscored
from rlhf_jax.types import Completions, LossFn, Mean, Params, Rng, Rollout, Term, TrainState, TrainStep

LogprobsOfResponsesFn = Callable[[Params, Completions], tuple[Array, Array]]
"""(trainable params, completions) -> (logprobs, entropy), float32 [B, T]."""

Advantages = Literal["standardised", "centred", "leave_one_out"]
Reduction = Literal["tokens", "sequences", "columns"]
Divisor = Literal["trained", "all"]


@dataclasses.dataclass(frozen=True)
class GRPOConfig:
    """The settings of GRPO; defaults as in TRL 1.16.0 (the loss of DAPO, no KL).

    GRPO (Shao et al. 2024) has reduction "sequences", kl_coefficient .04, kl_kind "k3". DAPO (Yu et al. 2025) has clip_high
    .28, reduction "tokens" and drop_zero_variance_groups. Dr. GRPO (Liu et al. 2025) has advantages "centred" and reduction
    "columns". GSPO (Zheng et al. 2025) has ratio "sequence", reduction "sequences", clip_low 3e-4 and clip_high 4e-4. RLOO
    (Ahmadian et al. 2024) has advantages "leave_one_out", kl_in "reward" and kl_coefficient .05.

    epochs: passes over a rollout.
    minibatches: updates per pass.
    clip_low, clip_high, dual_clip: bounds of the ratio, as in `ops.policy_loss`.
    ratio: of each "token", or one for the "sequence", exp of the mean log ratio.
    advantages: the baseline within a group, see `ops.group_advantages`.
    scale_epsilon: added to the deviation of a group.
    reduction: the mean over all "tokens", the mean over "sequences" of their token means, or the sum over all
    ``max_new_tokens`` "columns" of every response divided by their number.
    divisor: the responses that "sequences" and "columns" divide by: those that are trained on ("trained"), or "all", as TRL
    does with mask_truncated.
    kl_coefficient: weight of the KL to the reference; with 0 no reference is loaded and no KL measured.
    kl_kind: estimator of the KL; None = "k1" in the reward and "weighted_k3" in the loss, whose expected gradients are those of
    the KL (see `ops.kl`). The loss also takes "k3" (that of GRPO) and "k2". The weight of "weighted_k3" is the ratio of the
    token, also with ratio "sequence" (there TRL takes the ratio of the sequence, which is biased).
    kl_in: put the KL in the "loss" of every token, or summed over the response in the "reward".
    biased_kl: permit the other estimators, to replicate a run.
    mask_truncated: do not train on responses that were cut at the limit.
    drop_zero_variance_groups: do not train on groups whose scores are all equal; otherwise they count with advantage 0.
    missing_eos_penalty, missing_eos, score_clip, max_sampler_gap, max_identity_gap, max_kl, old_logprobs, importance: as in
    PPOConfig.
    """

    epochs: int = 1
    minibatches: int = 1
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    ratio: Literal["token", "sequence"] = "token"
    advantages: Advantages = "standardised"
    scale_epsilon: float = 1e-4
    reduction: Reduction = "tokens"
    divisor: Divisor = "trained"
    kl_coefficient: float = 0.0
    kl_kind: ops.KLTermKind | None = None
    kl_in: Literal["loss", "reward"] = "loss"
    biased_kl: bool = False
    mask_truncated: bool = False
    drop_zero_variance_groups: bool = False
    missing_eos_penalty: float | None = None
    missing_eos: Literal["replace", "subtract"] = "replace"
    score_clip: float | None = None
    max_sampler_gap: float = 1e-3
    max_identity_gap: float = 1e-3
    max_kl: float | None = None
    old_logprobs: Literal["scorer", "sampler"] = "scorer"
    importance: ImportanceConfig | None = None

    def __post_init__(self) -> None:
        choices = {
            "ratio": ("token", "sequence"),
            "advantages": get_args(Advantages),
            "reduction": get_args(Reduction),
            "divisor": get_args(Divisor),
            "kl_in": ("loss", "reward"),
            "mask_truncated": (True, False),
            "drop_zero_variance_groups": (True, False),
            "missing_eos": ("replace", "subtract"),
            "old_logprobs": ("scorer", "sampler"),
        }
        for name, allowed in choices.items():
            require_one_of(f"GRPOConfig.{name}", getattr(self, name), allowed)
        for name in ("epochs", "minibatches"):
            require_whole(f"GRPOConfig.{name}", getattr(self, name), 1)
        least = dict.fromkeys(("clip_low", "clip_high", "scale_epsilon", "kl_coefficient"), 0.0)
        least |= dict.fromkeys(("max_sampler_gap", "max_identity_gap"), 0.0)
        optional = {"missing_eos_penalty": 0.0, "score_clip": 0.0, "max_kl": 0.0, "dual_clip": 1.0}
        least |= {name: low for name, low in optional.items() if getattr(self, name) is not None}
        for name, low in least.items():
            require_number(f"GRPOConfig.{name}", getattr(self, name), low)
        require_kl_kind("GRPOConfig", self.kl_estimator, self.kl_in, self.biased_kl)
        check_double_counting("GRPOConfig", self.importance, self.old_logprobs)
        if self.ratio == "sequence" and self.reduction != "sequences":
            raise InputError(
                "GRPOConfig.ratio = 'sequence': its loss is one number a response and needs reduction = 'sequences'"
            )
        if self.divisor == "all" and self.reduction == "tokens":
            raise InputError(
                "GRPOConfig.divisor = 'all': reduction = 'tokens' divides by tokens; remove it, or take another reduction"
            )
        if self.max_kl is not None and not self.kl_coefficient:
            raise InputError(
                "GRPOConfig.max_kl: without kl_coefficient there is no reference to measure the KL against"
            )

    @property
    def kl_estimator(self) -> ops.KLTermKind:
        """``kl_kind``, or what None stands for."""
        if self.kl_kind is not None:
            return self.kl_kind
        return "k1" if self.kl_in == "reward" else "weighted_k3"

    @property
    def coefficients(self) -> dict[str, float]:
        """The coefficients of the terms of the loss."""
        kl = {"kl": self.kl_coefficient} if self.kl_coefficient and self.kl_in == "loss" else {}
        return {"policy": 1.0, **kl}


@struct.dataclass
class GroupBatch:
    """The batch of the update; constants.

    old_logprobs, ref_logprobs: float32 [B, T] (ref_logprobs None without a reference). advantages: float32 [B], one for
    all tokens of a response. counts: bool [B], False for responses that are not trained on. importance: float32 [B, T],
    weights of the policy loss; None = 1.
    """

    completions: Completions
    old_logprobs: Float[Array, "B T"]
    ref_logprobs: Float[Array, "B T"] | None
    advantages: Float[Array, "B"]  # noqa: F821
    counts: Bool[Array, "B"]  # noqa: F821
    importance: Float[Array, "B T"] | None = None


def prepare_groups(rollout: Rollout, config: GRPOConfig, samples: int) -> tuple[GroupBatch, dict[str, Mean]]:
    """Return the batch of the update, with advantages within each group, and the metrics of the rollout.

    Rows i * samples ... (i + 1) * samples - 1 of the rollout answer one prompt.

    Metrics: those of PPO that need no value model; score_within, the mean deviation within a group (ddof 1); zero_variance_groups,
    the share of groups with zero variance, whose responses all have the same score; trained_responses, the share of responses.
    A rollout with a score, KL or advantage that is not finite, or a KL beyond max_kl, is refused as in `prepare`.
    A response without a score belongs to no group and is not trained on.
    """
    rollout = without_unscored(rollout)
    completions, mask = rollout.completions, rollout.completions.mask
    scores = rollout.score
    if config.score_clip is not None:
        scores = jnp.clip(scores, -config.score_clip, config.score_clip)
    if config.missing_eos_penalty is not None:
        scores = ops.penalise_missing_eos(
            scores, completions.ended, penalty=config.missing_eos_penalty, mode=config.missing_eos
        )
    if (
        rollout.token_rewards is not None
    ):  # as in PPO beside the clipped score; one advantage for all tokens of a response
        scores = scores + ops.masked_sum(rollout.token_rewards, mask, axis=1)
    if rollout.ref_logprobs is not None and config.kl_in == "reward":
        kl = ops.kl_term(rollout.logprobs, rollout.logprobs, rollout.ref_logprobs, config.kl_estimator)
        scores = scores - config.kl_coefficient * ops.masked_sum(kl, mask, axis=1)
    counts = rollout.scored
    advantages = ops.group_advantages(
        scores, samples, kind=config.advantages, epsilon=config.scale_epsilon, scored=rollout.scored
    )
    even, within = _spread_within(scores, rollout.scored, samples)
    if config.mask_truncated:
        counts &= completions.ended
    if config.drop_zero_variance_groups:
        counts &= ~jnp.repeat(even, samples)
    metrics, usable = response_metrics(rollout, config)
    usable &= jnp.isfinite(advantages.sum())
    weights, weighed = rollout_weights(rollout, config.importance)
    metrics |= {
        "rollout_refused": Mean(1.0 - usable, jnp.ones(())),
        "score_shaped": Mean.of(scores, rollout.scored),
        "score_within": within,
        "zero_variance_groups": Mean.of(even),
        "trained_responses": Mean.of(counts),
        **weighed,
    }
    advantages = jnp.where(usable, advantages, jnp.nan)
    return GroupBatch(completions, rollout.logprobs, rollout.ref_logprobs, advantages, counts, weights), metrics


def _spread_within(scores: Array, scored: Array, samples: int) -> tuple[Array, Mean]:
    """Return (bool [groups], whether all scores of a group are equal, also when there are fewer than two; mean deviation within a
    group, ddof 1)."""
    grouped = scores.reshape(-1, samples)
    counts = scored.reshape(-1, samples)
    least, most = (
        grouped.min(axis=1, where=counts, initial=jnp.inf),
        grouped.max(axis=1, where=counts, initial=-jnp.inf),
    )
    return most <= least, Mean.of(grouped.std(axis=1, ddof=1, where=counts), counts.sum(axis=1) > 1)


def make_grpo_loss(logprobs_fn: LogprobsOfResponsesFn, config: GRPOConfig) -> LossFn:
    """Make the loss: the clipped surrogate with one advantage a response, plus kl_coefficient times the KL estimate, reduced as
    configured.

    Metrics: as PPO's without the value's. With ratio "sequence" ratio and clip_fraction are means over responses, each of
    which counts once however long it is.
    """

    def loss(params: Params, frozen: Params, batch: GroupBatch, rng: Rng) -> tuple[dict[str, Term], dict[str, Mean]]:
        del frozen, rng
        mask = batch.completions.mask & batch.counts[:, None]
        logprobs, entropy = logprobs_fn(params, batch.completions)
        # What lies outside the mask is put to 0 before the maths: its gradient is then exactly 0 too.
        logprobs, old = ops.zero_outside(logprobs, mask), ops.zero_outside(batch.old_logprobs, mask)
        log_ratio, advantages = logprobs - old, batch.advantages[:, None]
        if config.ratio == "sequence":
            log_ratio = jnp.broadcast_to(ops.masked_mean(log_ratio, mask, axis=1)[:, None], mask.shape)
        policy, clipped, ratio = ops.policy_loss(
            log_ratio,
            jnp.zeros_like(log_ratio),
            jnp.broadcast_to(advantages, mask.shape),
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            dual_clip=config.dual_clip,
        )
        parts = {"policy": policy if batch.importance is None else batch.importance * policy}
        if "kl" in config.coefficients:
            assert batch.ref_logprobs is not None
            reference = ops.zero_outside(batch.ref_logprobs, mask)
            parts["kl"] = ops.kl_term(logprobs, old, reference, config.kl_estimator)
        terms = {
            name: reduced(values, mask, batch.counts, config.reduction, config.coefficients[name], config.divisor)
            for name, values in parts.items()
        }
        once = ops.first_true(mask) if config.ratio == "sequence" else mask
        metrics = {
            "ratio": Mean.of(ratio, once),
            "identity_gap": Mean(jnp.abs(logprobs - old).max(), jnp.ones(())),
            "clip_fraction": Mean.of(clipped, once),
            "entropy": Mean.of(entropy, mask),
            **{f"approx_kl_{k}": Mean.of(ops.kl_estimate(old, logprobs, k), mask) for k in ("k1", "k2", "k3")},
        }
        return terms, metrics

    return loss


def reduced(
    values: Array,
    mask: Array,
    counts: Array,
    reduction: Reduction,
    coefficient: float,
    divisor: Divisor = "trained",
) -> Term:
    """Sum values per token to a term of the loss. values: [B, T], mask: tokens that count, counts: bool [B], rows that do.

    Losses [1, 1] and [2, 2, 2, 2] in rows of 8 columns: tokens 10 / 6 = 1.666667, sequences (1 + 2) / 2 = 1.5, columns
    10 / 16 = .625. When a third row was cut and is not learned from, divisor "all" makes them 3 / 3 = 1 and 10 / 24 =
    .416667.
    """
    require_one_of("reduction", reduction, get_args(Reduction))
    require_one_of("divisor", divisor, get_args(Divisor))
    rows = (counts if divisor == "trained" else jnp.ones_like(counts)).sum().astype(jnp.float32)
    if reduction == "tokens":
        mean = Mean.of(values, mask)
        return Term(mean.total, mean.weight, coefficient)
    if reduction == "sequences":
        return Term(ops.masked_mean(values, mask, axis=1).sum(), rows, coefficient)
    return Term(ops.masked_sum(values, mask), rows * mask.shape[1], coefficient)


def update_groups(
    train_step: TrainStep,
    state: TrainState,
    batch: GroupBatch,
    rng: Rng,
    config: GRPOConfig,
    frozen: Params | None = None,
) -> tuple[TrainState, dict[str, Mean]]:
    """Run the epochs of an update (`run_epochs`), as `ppo.update` does."""
    return run_epochs(train_step, state, batch, batch.advantages.shape[0], rng, config, frozen)

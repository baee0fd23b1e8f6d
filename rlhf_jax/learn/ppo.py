"""PPO: shaped rewards, advantages and the clipped update (Schulman et al. 2017; Ziegler et al. 2019 for language models)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array

from rlhf_jax import ops
from rlhf_jax.errors import InputError, require_number, require_one_of, require_whole
from rlhf_jax.learn.epochs import run_epochs
from rlhf_jax.learn.importance import ImportanceConfig, check_double_counting, rollout_weights
from rlhf_jax.learn.kl import require_kl_kind
from rlhf_jax.types import Completions, LossFn, Mean, Params, PolicyBatch, Rng, Rollout, Term, TrainState, TrainStep

PolicyFn = Callable[[Params, Completions], tuple[Array, Array, Array]]
"""(trainable params, completions) -> (logprobs, entropy, values), float32 [B, T]."""


@dataclasses.dataclass(frozen=True)
class PPOConfig:
    """The settings of PPO. Defaults: TL;DR of Huang et al. 2024 (N+), with the score paid at EOS.

    epochs: passes over a rollout, each with a new permutation.
    minibatches: updates per pass.
    clip_low, clip_high, dual_clip: bounds of the ratio, as in `ops.policy_loss`.
    value_clip: bound of the change of a value, as in `ops.value_loss`; None = off.
    value_coefficient: weight of the value loss.
    entropy_coefficient: weight of the entropy.
    discount: of GAE, a token.
    lam: lambda of GAE.
    kl_coefficient: initial weight of the KL in the reward.
    kl_kind: estimator in the reward, "k1" (see `ops.kl`; "k2" and "k3" need biased_kl = True).
    biased_kl: permit estimators with a biased gradient, to replicate a run.
    kl_target: None = fixed coefficient, else nats per response for the adaptive controller.
    kl_horizon: episodes of the adaptive controller.
    terminal: the column that receives the score.
    missing_eos_penalty: for responses that did not end, in units of the score; None = off.
    missing_eos: "replace" the score by the penalty, or "subtract" it.
    whiten_rewards: scale the shaped rewards to deviation 1, with their mean kept.
    whiten_advantages: over the whole "rollout", per "minibatch" or "none".
    whiten_ddof: 0, or 1 for Bessel's correction.
    score_clip: bound on |score|; None = off.
    max_sampler_gap: mean |sampler - scorer| log-probability in nats beyond which the run stops.
    max_identity_gap: largest |log ratio| before the first update beyond which the run stops.
    max_kl: nats per response, mean over a rollout, beyond which the rollout is refused; None = no limit.
    old_logprobs: those of the "scorer", recomputed for the policy at the rollout, or of the "sampler", which saves a forward
    pass; the identity gap is then between sampler and update.
    importance: weights for samples of an older policy; None = the scored policy sampled.
    """

    epochs: int = 4
    minibatches: int = 1
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    value_clip: float | None = 0.2
    value_coefficient: float = 0.1
    entropy_coefficient: float = 0.0
    discount: float = 1.0
    lam: float = 0.95
    kl_coefficient: float = 0.05
    kl_kind: ops.KLKind = "k1"
    biased_kl: bool = False
    kl_target: float | None = None
    kl_horizon: float = 10000.0
    terminal: Literal["eos", "after_eos", "last_column"] = "eos"
    missing_eos_penalty: float | None = 1.0
    missing_eos: Literal["replace", "subtract"] = "replace"
    whiten_rewards: bool = False
    whiten_advantages: Literal["rollout", "minibatch", "none"] = "rollout"
    whiten_ddof: int = 0
    score_clip: float | None = None
    max_sampler_gap: float = 1e-3
    max_identity_gap: float = 1e-3
    max_kl: float | None = None
    old_logprobs: Literal["scorer", "sampler"] = "scorer"
    importance: ImportanceConfig | None = None

    def __post_init__(self) -> None:
        choices = {
            "terminal": ("eos", "after_eos", "last_column"),
            "missing_eos": ("replace", "subtract"),
            "whiten_advantages": ("rollout", "minibatch", "none"),
            "whiten_ddof": (0, 1),
            "whiten_rewards": (True, False),
            "old_logprobs": ("scorer", "sampler"),
        }
        for name, allowed in choices.items():
            require_one_of(f"PPOConfig.{name}", getattr(self, name), allowed)
        for name in ("epochs", "minibatches"):
            require_whole(f"PPOConfig.{name}", getattr(self, name), 1)
        least = dict.fromkeys(
            ("clip_low", "clip_high", "value_coefficient", "entropy_coefficient", "kl_coefficient"), 0.0
        )
        least |= {"max_sampler_gap": 0.0, "max_identity_gap": 0.0, "kl_horizon": 1.0}
        optional = dict.fromkeys(("value_clip", "kl_target", "missing_eos_penalty", "score_clip", "max_kl"), 0.0)
        optional["dual_clip"] = 1.0
        least |= {name: low for name, low in optional.items() if getattr(self, name) is not None}
        for name, low in least.items():
            require_number(f"PPOConfig.{name}", getattr(self, name), low)
        for name in ("discount", "lam"):
            require_number(f"PPOConfig.{name}", getattr(self, name), 0.0, 1.0)
        require_kl_kind("PPOConfig", self.kl_kind, "reward", self.biased_kl)
        check_double_counting("PPOConfig", self.importance, self.old_logprobs)
        if self.kl_target == 0:
            raise InputError("PPOConfig.kl_target = 0: give nats above 0, or None for a fixed kl_coefficient")

    @property
    def coefficients(self) -> dict[str, float]:
        """The coefficients of the terms of the loss, without an entropy of weight 0."""
        entropy = {"entropy": -self.entropy_coefficient} if self.entropy_coefficient else {}
        return {"policy": 1.0, "value": self.value_coefficient, **entropy}


@struct.dataclass
class PPOState:
    """The state of a PPO run. train: params {"policy"[, "value"]} with their optimiser.
    kl_coefficient: float32 []."""

    train: TrainState
    kl_coefficient: Array


def prepare(rollout: Rollout, config: PPOConfig, kl_coefficient: Array) -> tuple[PolicyBatch, dict[str, Mean]]:
    """Return the batch of the update, with shaped rewards, advantages and returns of a whole rollout, and its metrics.

    Metrics: score and its spread, KL (summed over the response, mean over rows) and its standard error, the
    sampler-scorer gap, lengths, how many ended, explained variance of the value function, the importance weights.
    A rollout with a score, KL, advantage or return that is not finite, or a KL beyond max_kl, is refused: its
    advantages become NaN, which `make_train_step` refuses in every minibatch, and ``rollout_refused`` is 1.
    """
    rollout = without_unscored(rollout)
    if rollout.ref_logprobs is None or rollout.values is None:
        raise InputError("prepare: PPO needs a reference and values; score the rollout with both models")
    completions, mask = rollout.completions, rollout.completions.mask
    values_at = ops.value_mask(mask, config.terminal)
    values_at &= rollout.scored[:, None]
    kl = ops.zero_outside(ops.kl_estimate(rollout.logprobs, rollout.ref_logprobs, config.kl_kind), mask)
    scores = rollout.score
    if config.score_clip is not None:
        scores = jnp.clip(scores, -config.score_clip, config.score_clip)
    if config.missing_eos_penalty is not None:
        scores = ops.penalise_missing_eos(
            scores, completions.ended, penalty=config.missing_eos_penalty, mode=config.missing_eos
        )
    rewards = ops.shape_rewards(scores, kl, mask, kl_coefficient=kl_coefficient, convention=config.terminal)
    if rollout.token_rewards is not None:
        rewards = rewards + ops.zero_outside(rollout.token_rewards, mask)
    if config.whiten_rewards:
        rewards = ops.whiten(rewards, values_at, ddof=config.whiten_ddof, shift_mean=False)
    values = ops.zero_outside(rollout.values, values_at)
    advantages, returns = ops.gae(rewards, values, values_at, discount=config.discount, lam=config.lam)
    residual = ops.masked_var(returns - values, values_at)
    spread = ops.masked_var(returns, values_at)
    metrics, usable = response_metrics(rollout, config)
    usable &= jnp.isfinite(jnp.stack([x.sum() for x in (kl, advantages, returns)])).all()
    weights, weighed = rollout_weights(rollout, config.importance)
    metrics |= {
        "rollout_refused": Mean(1.0 - usable, jnp.ones(())),
        "score_shaped": Mean.of(rewards.sum(axis=1), rollout.scored),
        "value": Mean.of(values, values_at),
        "return": Mean.of(returns, values_at),
        "explained_variance": Mean(1.0 - residual / jnp.maximum(spread, 1e-8), jnp.ones(())),
        **weighed,
    }
    if config.whiten_advantages == "rollout":
        advantages = ops.whiten(advantages, mask, ddof=config.whiten_ddof)
    batch = PolicyBatch(
        completions=completions,
        old_logprobs=rollout.logprobs,
        old_values=values,
        advantages=jnp.where(usable, ops.zero_outside(advantages, mask), jnp.nan),
        returns=returns,
        value_mask=values_at,
        importance=weights,
    )
    return batch, metrics


def without_unscored(rollout: Rollout) -> Rollout:
    """Return ``rollout`` with no token of the responses that could not be scored."""
    completions = rollout.completions
    mask = completions.mask & rollout.scored[:, None]
    return dataclasses.replace(rollout, completions=dataclasses.replace(completions, mask=mask))


class RolloutLimits(Protocol):
    """The fields of PPOConfig and GRPOConfig that `response_metrics` reads."""

    @property
    def max_kl(self) -> float | None: ...
    @property
    def old_logprobs(self) -> str: ...


def response_metrics(rollout: Rollout, config: RolloutLimits) -> tuple[dict[str, Mean], Array]:
    """Return (metrics of any rollout, bool [] whether scores and KL are finite and the KL is within max_kl).

    KL metrics need a reference; the gap between sampler and scorer needs log-probabilities of both. rollout: of
    `without_unscored`.
    """
    completions, mask, one = rollout.completions, rollout.completions.mask, jnp.ones(())
    rows = rollout.scored
    score = rollout.score
    usable = jnp.isfinite(score.sum())
    metrics = {
        "score": Mean.of(score, rows),
        "score_std": Mean(jnp.std(score, where=rows), one),
        "sampled_entropy": Mean.of(-ops.zero_outside(rollout.logprobs, mask).sum(axis=1), rows),
        "response_length": Mean.of(mask.sum(axis=1), rows),
        "ended": Mean.of(completions.ended, rows),
    }
    if rollout.ref_logprobs is not None:
        k1 = ops.zero_outside(rollout.logprobs - rollout.ref_logprobs, mask)
        kl = Mean.of(k1.sum(axis=1), rows)
        usable &= jnp.isfinite(kl.total)
        if config.max_kl is not None:
            usable &= kl.value() <= config.max_kl
        metrics |= {
            "kl": kl,
            "kl_standard_error": _standard_error(k1.sum(axis=1), rows),
            "kl_per_token": Mean.of(k1, mask),
        }
    if config.old_logprobs == "scorer":
        gap = jnp.abs(ops.zero_outside(rollout.logprobs - completions.logprobs, mask))
        metrics |= {"sampler_gap": Mean.of(gap, mask), "sampler_gap_max": Mean(gap.max(), one)}
    return metrics, usable


def _standard_error(values: Array, rows: Array | None) -> Mean:
    """Return the standard error of the mean of float32 [B] (B - 1 in the denominator), without weight for a single row.

    rows: bool [B], those that count; None = all. [1, 2, 3, 4]: 1.290994 / 2 = 0.645497.
    """
    if values.shape[0] < 2:
        return Mean(jnp.zeros(()), jnp.zeros(()))
    if rows is None:
        return Mean(jnp.std(values, ddof=1) / values.shape[0] ** 0.5, jnp.ones(()))
    count = rows.sum().astype(jnp.float32)
    error = jnp.std(values, ddof=1, where=rows) / jnp.sqrt(jnp.maximum(count, 1.0))
    return Mean(jnp.where(count > 1, error, 0.0), (count > 1).astype(jnp.float32))


def make_ppo_loss(policy_fn: PolicyFn, config: PPOConfig) -> LossFn:
    """Make the loss: clipped policy loss + value_coefficient * clipped value loss - entropy_coefficient * entropy, token means."""

    def loss(params: Params, frozen: Params, batch: PolicyBatch, rng: Rng) -> tuple[dict[str, Term], dict[str, Mean]]:
        del frozen, rng
        mask, values_at = batch.completions.mask, batch.value_mask
        logprobs, entropy, values = policy_fn(params, batch.completions)
        # What lies outside the masks is put to 0 before the maths: its gradient is then exactly 0 too.
        logprobs, old = ops.zero_outside(logprobs, mask), ops.zero_outside(batch.old_logprobs, mask)
        policy, clipped, ratio = ops.policy_loss(
            logprobs,
            old,
            batch.advantages,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            dual_clip=config.dual_clip,
        )
        policy = policy if batch.importance is None else batch.importance * policy
        value, value_clipped = ops.value_loss(
            ops.zero_outside(values, values_at), batch.old_values, batch.returns, config.value_clip
        )
        pg, vf, spread = Mean.of(policy, mask), Mean.of(value, values_at), Mean.of(entropy, mask)
        means = {"policy": pg, "value": vf, "entropy": spread}
        terms = {name: Term(means[name].total, means[name].weight, c) for name, c in config.coefficients.items()}
        log_ratio = logprobs - old
        metrics = {
            "ratio": Mean.of(ratio, mask),
            "identity_gap": Mean(jnp.abs(log_ratio).max(), jnp.ones(())),
            "clip_fraction": Mean.of(clipped, mask),
            "value_clip_fraction": Mean.of(value_clipped, values_at),
            "entropy": spread,
            # Samples come from the old policy: the first argument of the estimators is the old log-probability.
            "approx_kl_k1": Mean.of(ops.kl_estimate(old, logprobs, "k1"), mask),
            "approx_kl_k2": Mean.of(ops.kl_estimate(old, logprobs, "k2"), mask),
            "approx_kl_k3": Mean.of(ops.kl_estimate(old, logprobs, "k3"), mask),
        }
        return terms, metrics

    return loss


def update(
    train_step: TrainStep,
    state: TrainState,
    batch: PolicyBatch,
    rng: Rng,
    config: PPOConfig,
    frozen: Params | None = None,
) -> tuple[TrainState, dict[str, Mean]]:
    """Run the epochs of an update (`run_epochs`), with advantages whitened per minibatch when so configured."""

    def whitened(chosen: PolicyBatch) -> PolicyBatch:
        white = ops.whiten(chosen.advantages, chosen.completions.mask, ddof=config.whiten_ddof)
        return dataclasses.replace(chosen, advantages=white)

    adjust = whitened if config.whiten_advantages == "minibatch" else None
    return run_epochs(train_step, state, batch, batch.advantages.shape[0], rng, config, frozen, adjust)


def next_kl_coefficient(config: PPOConfig, coefficient: Array, kl: Array, episodes: int) -> Array:
    """Return the coefficient of the adaptive controller after an update; it is fixed when kl_target is None.

    kl: mean over rows of the summed KL; a KL that is not finite changes nothing.
    """
    if config.kl_target is None:
        return coefficient
    adapted = ops.adaptive_kl_coefficient(
        coefficient, kl, episodes=episodes, target=config.kl_target, horizon=config.kl_horizon
    )
    return jnp.where(jnp.isfinite(kl), adapted, coefficient)


def ppo_optimizer_labels(params: Params) -> Any:
    """Return the optimizer ("policy" or "value") of each leaf of {"policy": ..., "value": ...}."""
    return {name: jax.tree.map(lambda _, name=name: name, tree) for name, tree in params.items()}

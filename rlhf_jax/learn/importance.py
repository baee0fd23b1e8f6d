"""Learning from samples of another distribution than the policy's: an older policy's (`run.one_step_off`), or of a sampler
whose numbers differ. Three policies then: the sampler, the scored one ("old"), the one that is trained (Hilton et al. 2022,
"Batch size-invariance for policy optimization"; Yao et al. 2025, "Your efficient RL framework secretly brings you
off-policy RL training")."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array

from rlhf_jax import ops
from rlhf_jax.errors import InputError, require_number, require_one_of
from rlhf_jax.types import Mean, Rollout


@dataclasses.dataclass(frozen=True)
class ImportanceConfig:
    """Every policy loss is multiplied by ``w = scored policy / sampler``, a constant, within bounds.

    unit, outside, low, high: see `ops.importance_weights` and `ops.bounded_importance`. As published: truncated importance
    sampling (TIS) unit "token", "clip", 0 ... 2 (the default); IcePop "token", "drop", .5 ... 5; masked importance sampling
    "sequence", "drop", 0 ... 3 (the default of TRL 1.16.0). What is dropped still counts in the loss's mean.
    """

    unit: ops.ImportanceUnit = "token"
    outside: ops.OutsideBounds = "clip"
    low: float = 0.0
    high: float = 2.0

    def __post_init__(self) -> None:
        require_one_of("ImportanceConfig.unit", self.unit, ("token", "sequence", "geometric"))
        require_one_of("ImportanceConfig.outside", self.outside, ("clip", "drop"))
        require_number("ImportanceConfig.low", self.low, 0.0, 1.0)
        require_number("ImportanceConfig.high", self.high, 1.0)


def check_double_counting(name: str, importance: ImportanceConfig | None, old_logprobs: str) -> None:
    """Check that there are no importance weights when the ratio of the loss starts from the sampler. Raises InputError otherwise.

    name: of the configuration.
    """
    if importance is not None and old_logprobs == "sampler":
        raise InputError(
            f"{name}.importance: with old_logprobs = 'sampler' the ratio holds policy / sampler already, it would count twice; "
            "remove one"
        )


def rollout_weights(rollout: Rollout, config: ImportanceConfig | None) -> tuple[Array | None, dict[str, Mean]]:
    """Return (the weights of the policy loss, float32 [B, T], or None; their metrics).

    Metrics: the mean before bounds, the share of tokens outside them, and the effective sample size of those within (Kish:
    (sum w)^2 / (n sum w^2), 1 = all equal).
    """
    if config is None:
        return None, {}
    completions, mask = rollout.completions, rollout.completions.mask
    raw = ops.importance_weights(rollout.logprobs, completions.logprobs, mask, config.unit)
    outside = (raw < config.low) | (raw > config.high)
    weights = ops.zero_outside(ops.bounded_importance(raw, config.low, config.high, config.outside), mask)
    count = mask.sum().astype(jnp.float32)
    return weights, {
        "importance": Mean.of(raw, mask),
        "importance_outside": Mean.of(outside, mask),
        "importance_sample_size": Mean(jnp.square(weights.sum()), count * jnp.square(weights).sum()),
    }

"""Guards that stop a run of PPO or GRPO, or warn, when its numbers contradict each other."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from typing import Protocol

import jax

from rlhf_jax.errors import RunStopped

FLAT_ROLLOUTS = (2, 20, 200, 2000)
"""Rollouts in a row without any reward spread at which a run warns: one is chance where rewards are rare."""
ROUNDING_OF_KL = 1e-3
"""Nats a response that float32 log-probabilities of hundreds of tokens may be off by."""


class GapLimits(Protocol):
    """The fields of PPOConfig and GRPOConfig that the guards read."""

    @property
    def max_sampler_gap(self) -> float: ...
    @property
    def max_identity_gap(self) -> float: ...
    @property
    def old_logprobs(self) -> str: ...


def stop_if_sampler_differs(step: int, gap: float | None, config: GapLimits, *, stale: bool = False) -> None:
    """Stop the run when sampler and scorer disagree. Raises RunStopped beyond the limit.

    gap: mean |sampler - scorer| log-probability of a rollout, nats a token. stale: an older policy sampled it, so that the gap is
    a real change of the policy.
    """
    if not stale and gap is not None and not gap <= config.max_sampler_gap:  # NaN too
        raise RunStopped(
            f"step {step}: sampler and scorer differ by {gap:.2e} nats a token, limit "
            f"{type(config).__name__}.max_sampler_gap = {config.max_sampler_gap}: the ratio would be wrong"
        )


def stop_if_not_identity(step: int, gap: float | None, config: GapLimits, *, stale: bool = False) -> None:
    """Stop the run when the first ratio of an iteration is not 1. Raises RunStopped beyond the limit.

    gap: largest |log ratio| before the first update of an iteration. stale: an older policy sampled; when its own log-probabilities
    are the old ones, the first ratio is not 1.
    """
    if stale and config.old_logprobs == "sampler":
        return
    if gap is not None and not gap <= config.max_identity_gap:  # NaN too
        raise RunStopped(
            f"step {step}: before the first update |log ratio| is {gap:.2e}, limit {type(config).__name__}.max_identity_gap "
            f"= {config.max_identity_gap}: update and scorer see different models or masks"
        )


def warn_if_kl_is_negative(step: int, kl: float | None, standard_error: float | None) -> bool:
    """Warn on stderr when the estimate of the KL to the reference is negative beyond noise. Returns whether it is.

    kl: mean over a rollout of log-probability policy minus reference on the samples, nats a response; its expectation is
    the KL, which is >= 0, only when the samples are the scored policy's own. Below -3 standard errors (and rounding) they
    are not: top_k, top_p, min_p, a repetition penalty or min_new_tokens draw from another distribution, and so does a
    sampler that differs from the scorer (huggingface/trl issues 239, 262, 352). The penalty then pays for going there.
    """
    if kl is None or standard_error is None or not kl < -3.0 * standard_error - ROUNDING_OF_KL:
        return False
    if jax.process_index() == 0:
        print(
            f"warning: step {step}: the KL to the reference is estimated as {kl:.3g} nats a response, "
            f"{-kl / max(standard_error, 1e-9):.1f} standard errors below 0: the samples are not the policy's own; "
            "leave top_k, top_p, min_p, repetition_penalty and min_new_tokens of SamplingConfig off, or lower "
            "the kl_coefficient",
            file=sys.stderr,
        )
    return True


@dataclasses.dataclass
class RewardSpread:
    """Watches for rollouts that teach nothing because all their rewards are the same. flat: how many in a row so far."""

    flat: int = 0

    def warn(self, step: int, measured: Mapping[str, float | None]) -> bool:
        """Warn on stderr when `FLAT_ROLLOUTS` rollouts in a row have no spread of rewards. Returns whether it warned.

        measured: metrics of `prepare` or `prepare_groups`. Spread is that within groups where there are groups.
        """
        even, deviation, score = (measured.get(name) for name in ("zero_variance_groups", "score_std", "score"))
        rounding = 1e-6 * max(1.0, abs(score or 0.0))
        grouped = even is not None
        none = even == 1.0 if grouped else deviation is not None and deviation <= rounding
        self.flat = self.flat + 1 if none else 0
        if self.flat not in FLAT_ROLLOUTS:
            return False
        if jax.process_index() == 0:
            reason = (
                "all responses of every prompt have the same reward"
                if grouped
                else "all responses have the same reward"
            )
            print(
                f"warning: step {step}: {self.flat} rollouts in a row without any reward spread: {reason} (mean "
                f"{score or 0.0:.3g}), so that nothing is learned from it; look at the reward, raise "
                "SamplingConfig.temperature, or take prompts that are answered well sometimes",
                file=sys.stderr,
            )
        return True

"""What stops a run, or is told, when its numbers contradict each other (PPO and GRPO)."""

from __future__ import annotations

import sys
from typing import Protocol

import jax

from rlhf_jax.types import RunStopped

ROUNDING_OF_KL = 1e-3
"""Nats a response that float32 log-probabilities of hundreds of tokens may be off by."""


class GapLimits(Protocol):
    """What the two guards read of PPOConfig and GRPOConfig."""

    @property
    def max_sampler_gap(self) -> float: ...
    @property
    def max_identity_gap(self) -> float: ...
    @property
    def old_logprobs(self) -> str: ...


def stop_if_sampler_differs(step: int, gap: float | None, config: GapLimits, *, stale: bool = False) -> None:
    """gap: mean |sampler - scorer| log-probability of a rollout, nats a token. stale: an older policy sampled it, and the gap
    is what it has learned since. Raises RunStopped beyond the limit."""
    if not stale and gap is not None and not gap <= config.max_sampler_gap:  # NaN too
        raise RunStopped(
            f"step {step}: sampler and scorer differ by {gap:.2e} nats a token, limit "
            f"{type(config).__name__}.max_sampler_gap = {config.max_sampler_gap}: the ratio would be wrong"
        )


def stop_if_not_identity(step: int, gap: float | None, config: GapLimits, *, stale: bool = False) -> None:
    """gap: largest |log ratio| before the first update of an iteration. stale: an older policy sampled; where its own
    log-probabilities are the old ones, the first ratio is not 1. Raises RunStopped beyond the limit."""
    if stale and config.old_logprobs == "sampler":
        return
    if gap is not None and not gap <= config.max_identity_gap:  # NaN too
        raise RunStopped(
            f"step {step}: before the first update |log ratio| is {gap:.2e}, limit {type(config).__name__}.max_identity_gap "
            f"= {config.max_identity_gap}: update and scorer see different models or masks"
        )


def warn_if_kl_is_negative(step: int, kl: float | None, standard_error: float | None) -> bool:
    """Whether the estimate of the KL to the reference is negative beyond noise; then a line on stderr.

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

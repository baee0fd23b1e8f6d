"""Checks of one rollout, before any update."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rlhf_jax.doctor.findings import Finding, judge
from rlhf_jax.learn import GRPOConfig, PPOConfig
from rlhf_jax.types import Mean


def rollout_checks(
    metrics: Mapping[str, Mean], limits: PPOConfig | GRPOConfig, max_new_tokens: int
) -> Iterator[Finding]:
    """Check sampler against scorer, policy against reference (where there is one), rewards, groups, lengths.

    metrics: those of `learn.prepare` or `learn.prepare_groups`.
    """
    if "sampler_gap" in metrics:  # else the run's own identity gap measures it
        gap = float(metrics["sampler_gap"].value())
        words = f"{gap:.1e} nats a token, limit {limits.max_sampler_gap:g}"
        remedy = "the ratio would be wrong: same dtype, no top_k, top_p"
        yield judge("sampler and scorer", gap <= limits.max_sampler_gap, words, remedy)
    if "kl" in metrics:
        kl = float(metrics["kl"].value())
        words = f"KL {kl:.1e} nats before any update"
        yield judge("reference", abs(kl) < 1e-2, words, "policy and reference must begin as one model")
    spread = float(metrics["score_std"].value())
    yield judge(
        "reward spread",
        spread > 0,
        f"{spread:.3g} over the rollout",
        "every response scores alike: nothing to learn from",
    )
    if "zero_variance_groups" in metrics:
        even = float(metrics["zero_variance_groups"].value())
        words = f"{even:.0%} of the prompts' groups score all alike"
        yield judge(
            "groups", even < 1, words, "nothing to learn from: another reward, more samples, a higher temperature"
        )
    ended, length = (float(metrics[name].value()) for name in ("ended", "response_length"))
    words = f"{ended:.0%} end by themselves, mean length {length:.0f} of {max_new_tokens}"
    yield judge("responses", ended > 0, words, "raise SamplingConfig.max_new_tokens, or SFT did not learn to stop")

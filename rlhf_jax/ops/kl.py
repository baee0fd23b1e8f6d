"""Estimates of KL(policy || reference) from samples of the policy, and the controller of its coefficient.

With d = log policy(x) - log reference(x) and x sampled from the policy (J. Schulman, "Approximating KL divergence",
2020): k1 = d, unbiased, may be negative; k2 = d^2 / 2, biased, low variance; k3 = exp(-d) - 1 + d, unbiased, never
negative.

In a REWARD only the value matters: k1 or k3. In a LOSS the gradient matters, samples held fixed, and it is another
story: E[grad k1] = 0 (no regularisation at all), E[grad k2] = the gradient of KL(policy || reference), E[grad k3] = the
gradient of the FORWARD divergence, policy minus reference in logit space. For policy [.7, .3] and reference [.5, .5]
the gradient in the logits is [.1779, -.1779] (k2, the true one), [.2, -.2] (k3), [0, 0] (k1).
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from rlhf_jax.types import InputError

KLKind = Literal["k1", "k2", "k3"]


def kl_estimate(logprobs: jax.Array, ref_logprobs: jax.Array, kind: KLKind = "k1") -> jax.Array:
    """Per-token estimate of KL in nats, float32, same shape as the inputs. No clamping: an outlier is a finding.

    The first argument is the distribution that was SAMPLED FROM. So the "approximate KL" of an update, measured on
    samples of the old policy, is ``kl_estimate(old_logprobs, logprobs, kind)``: k2 is the ``approxkl = .5 mean(d^2)``
    of openai/lm-human-preferences, k3 the ``mean(ratio - 1 - log ratio)`` of MOSS-RLHF, k1 that of most later code.
    Example: new [-1, -.5, -2], old [-1.3, -.4, -1.5]: means k1 .1, k2 .0583333, k3 .0537423.
    Raises InputError for another ``kind``.
    """
    d = logprobs.astype(jnp.float32) - ref_logprobs.astype(jnp.float32)
    if kind == "k1":
        return d
    if kind == "k2":
        return 0.5 * jnp.square(d)
    if kind == "k3":
        return jnp.expm1(-d) + d  # expm1 keeps the digits of a tiny d; float32 exp(-d) - 1 + d does not
    raise InputError(f"kl kind={kind!r}: use one of 'k1', 'k2', 'k3'")


def adaptive_kl_coefficient(
    coefficient: float | jax.Array, kl: float | jax.Array, *, episodes: int, target: float, horizon: float
) -> jax.Array:
    """The KL coefficient of the next iteration (Ziegler et al. 2019, section 2.2). float32 [].

    ``coefficient * (1 + clip(kl / target - 1, -.2, .2) * episodes / horizon)``.
    kl: nats per RESPONSE: the batch mean of the k1 SUM over its tokens (not a per-token mean, not approxkl).
    episodes: responses in the batch it was measured on (not optimiser steps). target: nats. horizon: episodes.
    Example: coefficient .15, 512 episodes, target 6, horizon 1e4: kl 0 -> .148464, kl 12 -> .151536, kl 6.6 -> .150768.
    """
    if not (episodes > 0 and target > 0 and horizon > 0):
        raise InputError(f"adaptive KL: episodes={episodes}, target={target}, horizon={horizon}: all must be above 0")
    error = jnp.clip(jnp.asarray(kl, jnp.float32) / target - 1.0, -0.2, 0.2)
    return jnp.asarray(coefficient, jnp.float32) * (1.0 + error * (episodes / horizon))

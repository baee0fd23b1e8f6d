"""Estimates of KL(policy || reference) from samples of the policy, and the controller of its coefficient.

With d = log policy(x) - log reference(x) and x sampled from the policy (J. Schulman, "Approximating KL divergence",
2020): k1 = d, unbiased, may be negative; k2 = d^2 / 2, biased, low variance; k3 = exp(-d) - 1 + d, unbiased, never
negative. An unbiased VALUE is what a metric needs. Training needs an unbiased GRADIENT, and that depends on where the
KL stands. For policy [.7, .3] and reference [.5, .5] the true gradient in the logits is [.1779, -.1779].

- In a REWARD the estimate is a constant that multiplies grad log policy. k1 gives the true gradient. k3 gives the gradient
  of KL(policy || reference) minus that of KL(reference || policy), [-.0221, .0221] here, and k2 [-.0155, .0155]: both push
  the policy AWAY from the reference (arXiv 2512.21852). TRL 1.16 (RLOO), verl and OpenRLHF take k1 by default.
- In a LOSS the estimate itself is differentiated, samples held fixed. k1 has the expected gradient 0 (no regularisation at
  all; the default of Tunix' GRPO). k2 has the true one while the policy is the one that sampled, k3 that of the FORWARD
  divergence KL(reference || policy), [.2, -.2] (Shao et al. 2024, GRPO). k3 times the ratio policy / sampling policy, the
  ratio differentiated too, has the true one wherever the policy is (DeepSeek-V3.2; TRL 1.16's default for GRPO). verl's
  "k3+" shows the value of k3 and takes the gradient of k2.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from rlhf_jax.errors import InputError
from rlhf_jax.ops.arguments import require_same_shape
from rlhf_jax.ops.losses import MAX_LOG_RATIO

KLKind = Literal["k1", "k2", "k3"]
KLTermKind = Literal["k1", "k2", "k3", "weighted_k3"]


def kl_estimate(logprobs: jax.Array, ref_logprobs: jax.Array, kind: KLKind = "k1") -> jax.Array:
    """Estimate the KL divergence of every token in nats, float32, same shape as the inputs. No clamping: an outlier is a finding.

    The first argument is the distribution that was SAMPLED FROM. So the "approximate KL" of an update, measured on
    samples of the old policy, is ``kl_estimate(old_logprobs, logprobs, kind)``: k2 is the ``approxkl = .5 mean(d^2)``
    of openai/lm-human-preferences, k3 the ``mean(ratio - 1 - log ratio)`` of MOSS-RLHF, k1 that of most later code.
    Example: new [-1, -.5, -2], old [-1.3, -.4, -1.5]: means k1 .1, k2 .0583333, k3 .0537423.
    Raises InputError for another ``kind`` or unequal shapes.
    """
    require_same_shape("kl_estimate", logprobs=logprobs, ref_logprobs=ref_logprobs)
    d = logprobs.astype(jnp.float32) - ref_logprobs.astype(jnp.float32)
    if kind == "k1":
        return d
    if kind == "k2":
        return 0.5 * jnp.square(d)
    if kind == "k3":
        return jnp.expm1(-d) + d  # expm1 keeps the digits of a tiny d; float32 exp(-d) - 1 + d does not
    raise InputError(f"kl kind={kind!r}: use one of 'k1', 'k2', 'k3'")


def kl_term(logprobs: jax.Array, old_logprobs: jax.Array, ref_logprobs: jax.Array, kind: KLTermKind) -> jax.Array:
    """Return the KL term of a loss for every token, to be differentiated in ``logprobs``, float32, same shape as the inputs.

    old_logprobs: of the policy that sampled, a constant; only "weighted_k3" reads it: ``exp(logprobs - old) * k3``, log
    ratio clamped to +-20. The other kinds are those of `kl_estimate`. Raises InputError for another ``kind``.

    Example: log-probability -1, old -1.2, reference -1.5: d = .5, k3 = .106531, ratio e^.2 = 1.221403: .130117.
    """
    require_same_shape("kl_term", logprobs=logprobs, old_logprobs=old_logprobs, ref_logprobs=ref_logprobs)
    if kind != "weighted_k3":
        return kl_estimate(logprobs, ref_logprobs, kind)
    old_logprobs = jax.lax.stop_gradient(old_logprobs.astype(jnp.float32))
    log_ratio = jnp.clip(logprobs.astype(jnp.float32) - old_logprobs, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    return jnp.exp(log_ratio) * kl_estimate(logprobs, ref_logprobs, "k3")


def adaptive_kl_coefficient(
    coefficient: float | jax.Array, kl: float | jax.Array, *, episodes: int, target: float, horizon: float
) -> jax.Array:
    """Return the KL coefficient of the next iteration (Ziegler et al. 2019, section 2.2). float32 [].

    ``coefficient * (1 + clip(kl / target - 1, -.2, .2) * episodes / horizon)``.
    kl: nats per RESPONSE: the batch mean of the k1 SUM over its tokens (not a per-token mean, not approxkl).
    episodes: responses in the batch it was measured on (not optimiser steps). target: nats. horizon: episodes.
    Example: coefficient .15, 512 episodes, target 6, horizon 1e4: kl 0 -> .148464, kl 12 -> .151536, kl 6.6 -> .150768.
    """
    if not (episodes > 0 and target > 0 and horizon > 0):
        raise InputError(f"adaptive KL: episodes={episodes}, target={target}, horizon={horizon}: all must be above 0")
    if jnp.ndim(kl) or jnp.ndim(coefficient):
        raise InputError("adaptive KL: coefficient and kl must be single numbers: give the mean over responses")
    error = jnp.clip(jnp.asarray(kl, jnp.float32) / target - 1.0, -0.2, 0.2)
    return jnp.asarray(coefficient, jnp.float32) * (1.0 + error * (episodes / horizon))

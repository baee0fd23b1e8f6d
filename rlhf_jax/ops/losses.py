"""Losses per token, pair or prompt. Reductions belong to the caller, who keeps total and weight apart (Term, Mean).

Inputs that come from padding may be finite garbage; if they may be NaN, pass them through ``zero_outside`` FIRST.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rlhf_jax.ops.arguments import require_ids, require_mask, require_rows, require_same_shape, require_within
from rlhf_jax.ops.masking import masked_mean, zero_outside

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to +-20 before ``exp``: e^20 = 4.9e8 is far beyond any clip range and still finite in float32;
an infinite ratio on the branch that is not taken would make the gradient 0 * inf = NaN."""


def nll_loss(logprobs: jax.Array, mask: jax.Array) -> jax.Array:
    """Return the negative log-likelihood of every target token, float32, 0 outside ``mask``. Shapes: all [B, S]."""
    return -zero_outside(logprobs, mask)


def pairwise_loss(chosen: jax.Array, rejected: jax.Array, margin: float | jax.Array = 0.0) -> jax.Array:
    """Return the Bradley-Terry loss of every pair, ``-log sigmoid(chosen - rejected - margin)``, float32, same shape.

    softplus form, finite for any gap (``log(1 + exp(rejected - chosen))`` overflows at 89). margin: Llama 2 (Touvron et
    al. 2023, eq. 2). Examples: chosen 1, rejected 0: .313262; with margin .5: .474077; equal rewards: log 2.
    """
    require_same_shape("pairwise_loss", chosen=chosen, rejected=rejected)
    if jnp.ndim(margin):
        require_same_shape("pairwise_loss", chosen=chosen, margin=margin)
    return jax.nn.softplus(-(chosen.astype(jnp.float32) - rejected.astype(jnp.float32) - margin))


def centring_penalty(chosen: jax.Array, rejected: jax.Array) -> jax.Array:
    """Return ``(chosen + rejected)^2`` for every pair, float32, which pulls rewards to mean 0.

    The pairwise loss leaves them free by a constant (Eisenstein et al. 2023, "Helping or herding?").
    """
    require_same_shape("centring_penalty", chosen=chosen, rejected=rejected)
    return jnp.square(chosen.astype(jnp.float32) + rejected.astype(jnp.float32))


def best_of_k_loss(rewards: jax.Array, best: jax.Array) -> jax.Array:
    """Return the softmax cross-entropy of the response chosen out of K (Ziegler et al. 2019, eq. 1).

    rewards: [..., K]. best: int [...], the column picked; NaN for one that is none. Returns float32 [...].
    Example: rewards [.1, .4, -.2, .3], best 1: 1.161420.
    """
    rewards = rewards.astype(jnp.float32)
    require_ids("best_of_k_loss", best=best)
    require_rows("best_of_k_loss", rewards, best=best)
    inside = jnp.where(best < 0, rewards.shape[-1], best)[..., None]
    picked = jnp.take_along_axis(rewards, inside, axis=-1, mode="fill", fill_value=jnp.nan)[..., 0]
    return jax.nn.logsumexp(rewards, axis=-1) - picked


def plackett_luce_loss(rewards: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Return the negative log-likelihood of a whole ranking: ``-sum_i [r_i - logsumexp(r_i .. r_K)]`` (Plackett 1975).

    rewards: [..., K] in ranked order, best first. mask: bool [..., K], False for missing items (rankings of different
    length). Returns float32 [...]. K = 2 equals ``pairwise_loss``. Example: [1.2, .3, -.5]: .834365.
    """
    counted = _ranked("plackett_luce_loss", rewards, mask)
    # -1e30 instead of -inf, so that no -inf - -inf = NaN is computed below, not even in an entry that is masked afterwards.
    ranked = jnp.where(counted, rewards.astype(jnp.float32), -1e30)
    remaining = jax.lax.cumlogsumexp(ranked, axis=ranked.ndim - 1, reverse=True)
    return jnp.where(counted, remaining - ranked, 0.0).sum(axis=-1)


def kwise_loss(rewards: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Return the mean of ``-log sigmoid(r_w - r_l)`` over all K (K - 1) / 2 pairs of one prompt (Ouyang et al. 2022, eq. 1).

    rewards: [..., K] in ranked order, best first. mask: bool [..., K]. Returns float32 [...]; 0 when no pair exists.
    All pairs of a prompt stay in one batch element: shuffled across batches the same completions are seen K - 1 times
    and overfit. Example: [1.2, .3, -.5]: pairs .341154 (1, 2), .167786 (1, 3), .371101 (2, 3); mean .293347.
    """
    counted = _ranked("kwise_loss", rewards, mask)
    rewards = zero_outside(rewards, counted)
    gaps = rewards[..., :, None] - rewards[..., None, :]
    better = jnp.triu(jnp.ones(gaps.shape[-2:], jnp.bool_), k=1)
    pairs = better & counted[..., :, None] & counted[..., None, :]
    return masked_mean(jax.nn.softplus(-gaps), pairs, axis=(-2, -1))


def _ranked(function: str, rewards: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Return a mask of the items of a ranking that exist, bool like ``rewards``."""
    if mask is None:
        return jnp.ones(rewards.shape, jnp.bool_)
    require_mask(function, mask=mask)
    require_same_shape(function, rewards=rewards, mask=mask)
    return mask


def rating_loss(rewards: jax.Array, ratings: jax.Array) -> jax.Array:
    """Return ``(reward - rating)^2`` for absolute ratings; same shape, float32 (lm-human-preferences, ``ScalarRating``)."""
    require_same_shape("rating_loss", rewards=rewards, ratings=ratings)
    return jnp.square(rewards.astype(jnp.float32) - ratings.astype(jnp.float32))


def magnitude_loss(first: jax.Array, second: jax.Array, difference: jax.Array) -> jax.Array:
    """Return ``((second - first) - difference)^2`` for comparisons with a magnitude; float32, same shape.

    difference > 0 means that the SECOND is better by that much: the sign of lm-human-preferences' ``ScalarComparison``.
    """
    require_same_shape("magnitude_loss", first=first, second=second, difference=difference)
    gap = second.astype(jnp.float32) - first.astype(jnp.float32)
    return jnp.square(gap - difference.astype(jnp.float32))


def binary_label_loss(rewards: jax.Array, labels: jax.Array) -> jax.Array:
    """Return ``-log sigmoid(reward)`` where ``labels`` is True (good), ``-log sigmoid(-reward)`` where False; float32."""
    require_mask("binary_label_loss", labels=labels)
    require_same_shape("binary_label_loss", rewards=rewards, labels=labels)
    rewards = rewards.astype(jnp.float32)
    return jax.nn.softplus(jnp.where(labels, -rewards, rewards))


def normalising_gain_bias(
    mean: float | jax.Array, std: float | jax.Array, *, target_mean: float = 0.0, target_std: float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """Return (gain, bias) such that ``gain * reward + bias`` has the target statistics (Ziegler et al. 2019).

    mean, std: of the rewards before; rewards that are all alike (std 0) get an infinite gain, which the caller refuses.
    Example: mean .3, std 2 -> gain .5, bias -.15.
    """
    gain = jnp.asarray(target_std, jnp.float32) / std
    return gain, target_mean - gain * mean


def policy_loss(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return PPO's clipped surrogate per token (Schulman et al. 2017, eq. 7): (loss, clipped, ratio), shaped like the inputs.

    ``ratio = exp(logprobs - old_logprobs)``; ``loss = max(-A ratio, -A clip(ratio, 1 - clip_low, 1 + clip_high))``
    float32; ``clipped``: bool, True where the clipped branch is the larger one. Old log-probabilities and advantages
    are constants. clip_low != clip_high: DAPO's "clip higher". dual_clip: a bound c > 1 with loss <= -c A for A < 0 (Ye
    et al. 2020).

    Example, both clips .2: ratio 1.35, A = 1: max(-1.35, -1.2) = -1.2, clipped. Ratio 5, A = -1: 5, with dual_clip 3:
    3.
    """
    require_same_shape("policy_loss", logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    require_within("policy_loss", "clip_low", clip_low, 0.0)
    require_within("policy_loss", "clip_high", clip_high, 0.0)
    if dual_clip is not None:
        require_within("policy_loss", "dual_clip", dual_clip, 1.0)
    advantages = jax.lax.stop_gradient(advantages.astype(jnp.float32))
    old_logprobs = jax.lax.stop_gradient(old_logprobs.astype(jnp.float32))
    log_ratio = jnp.clip(logprobs.astype(jnp.float32) - old_logprobs, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = jnp.exp(log_ratio)
    free = -advantages * ratio
    bounded = -advantages * jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    clipped = bounded > free
    loss = jnp.where(clipped, bounded, free)
    if dual_clip is not None:
        loss = jnp.where(advantages < 0, jnp.minimum(loss, -dual_clip * advantages), loss)
    return loss, clipped, ratio


def value_loss(
    values: jax.Array, old_values: jax.Array, returns: jax.Array, clip: float | None
) -> tuple[jax.Array, jax.Array]:
    """Return the clipped squared error of the value function per token: (loss, clipped); the factor 1/2 is INCLUDED.

    ``loss = .5 max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2)`` float32; ``clipped``: bool, True where the
    clipped branch is the larger one. clip None: ``.5 (V - R)^2``. Old values and returns are constants. Source:
    openai/baselines ``ppo2``; Huang et al. 2022, "The 37 implementation details of PPO", detail 9.

    Example: V [1, 0], V_old [.5, .1], R [.2, 1], clip .2: squares [.64, 1], loss [.32, .5], mean .41, nothing clipped.
    """
    require_same_shape("value_loss", values=values, old_values=old_values, returns=returns)
    if clip is not None:
        require_within("value_loss", "clip", clip, 0.0)
    values = values.astype(jnp.float32)
    old_values = jax.lax.stop_gradient(old_values.astype(jnp.float32))
    returns = jax.lax.stop_gradient(returns.astype(jnp.float32))
    free = jnp.square(values - returns)
    if clip is None:
        return 0.5 * free, jnp.zeros(free.shape, jnp.bool_)
    bounded = jnp.square(jnp.clip(values, old_values - clip, old_values + clip) - returns)
    clipped = bounded > free
    return 0.5 * jnp.where(clipped, bounded, free), clipped

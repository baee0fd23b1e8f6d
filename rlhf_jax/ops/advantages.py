"""Per-token rewards of a response and the advantages that follow from them.

Where the sequence's score is paid is a convention, and the three in use are NOT equivalent (with values [.1, .2, .3,
.4] the first advantage of the example in ``shape_rewards`` is 1.6335 under "eos" and 1.5692 under "after_eos"):

- "eos": on the last response token, the end-of-sequence token when there is one. Most frameworks; the default here.
- "after_eos": one column later when there is one, and the value mask grows by that column, the policy mask does not
  (Huang et al. 2024, "The N+ implementation details of RLHF with PPO"; TRL).
- "last_column": always on the last column of the fixed-length response (Ziegler et al. 2019).
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from rlhf_jax.errors import InputError
from rlhf_jax.ops.arguments import require_mask, require_rows, require_same_shape, require_within
from rlhf_jax.ops.masking import last_true_index, zero_outside

Convention = Literal["eos", "after_eos", "last_column"]
MissingEos = Literal["replace", "subtract"]
Carry = tuple[jax.Array, jax.Array]


def gae(
    rewards: jax.Array, values: jax.Array, response_mask: jax.Array, *, discount: float, lam: float
) -> tuple[jax.Array, jax.Array]:
    """Compute generalised advantage estimates (Schulman et al. 2016, eq. 16) along the response.

    ``delta_t = r_t + discount V_{t+1} - V_t``, ``A_t = delta_t + discount lam A_{t+1}``, ``returns_t = A_t + V_t``; the
    value after the last counted token is 0 (no bootstrap, also when the response was cut at the length limit).

    rewards, values: [B, T]; values[t] is read BEFORE emitting token t. response_mask: bool [B, T], the steps that
    exist: the ``value_mask`` of the convention. Masked columns in the middle (tool output) are stepped over: the token
    before them sees the next counted value and advantage, as if they were absent; so rewards and values in masked
    columns, NaN included, are ignored. Returns (advantages, returns), float32 [B, T], 0 where masked.

    Example: rewards [0, 0, 1], values [.5, .6, .7], discount 1, lam .95: A_2 = 1 - .7 = .3; A_1 = .7 - .6 + .95 * .3 =
    .385; A_0 = .6 - .5 + .95 * .385 = .46575; returns [.96575, .985, 1].
    """
    require_same_shape("gae", rewards=rewards, values=values, response_mask=response_mask)
    require_within("gae", "discount", discount, 0.0, 1.0)
    require_within("gae", "lam", lam, 0.0, 1.0)
    rewards, values = rewards.astype(jnp.float32), zero_outside(values, response_mask)

    def step(carry: Carry, inputs: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[Carry, jax.Array]:
        next_value, next_advantage = carry
        reward, value, counts = inputs
        advantage = reward + discount * next_value - value + discount * lam * next_advantage
        carried = (jnp.where(counts, value, next_value), jnp.where(counts, advantage, next_advantage))
        return carried, jnp.where(counts, advantage, 0.0)

    start = jnp.zeros(rewards.shape[:1], jnp.float32)
    _, advantages = jax.lax.scan(step, (start, start), (rewards.T, values.T, response_mask.T), reverse=True)
    advantages = advantages.T
    return advantages, advantages + values


def terminal_index(mask: jax.Array, convention: Convention = "eos") -> jax.Array:
    """Return the column that receives the score of the response, int32 [B]. mask: bool [B, T], the response mask with EOS.

    -1 for a row without any response token, except "last_column", which is T - 1 always. Under "after_eos" a response
    that fills all T columns receives it on its last token.
    """
    last = last_true_index(mask)
    final = mask.shape[-1] - 1
    if convention == "eos":
        return last
    if convention == "after_eos":
        return jnp.where(last < 0, -1, jnp.minimum(last + 1, final))
    if convention == "last_column":
        return jnp.full_like(last, final)
    raise InputError(f"terminal convention={convention!r}: use one of 'eos', 'after_eos', 'last_column'")


def terminal_mask(mask: jax.Array, convention: Convention = "eos") -> jax.Array:
    """Return a mask of the column of ``terminal_index`` (none in an empty row). bool [B, T] -> bool [B, T]."""
    columns = jnp.arange(mask.shape[-1], dtype=jnp.int32)
    return columns == terminal_index(mask, convention)[..., None]


def value_mask(mask: jax.Array, convention: Convention = "eos") -> jax.Array:
    """Return the mask of values and returns, given the response mask. bool [B, T] -> bool [B, T].

    "eos": the response mask. "after_eos": with the terminal column added. "last_column": every column.
    """
    require_mask("value_mask", mask=mask)
    if convention == "last_column":
        return jnp.ones_like(mask)
    return mask | terminal_mask(mask, convention)


def shape_rewards(
    scores: jax.Array,
    kl: jax.Array,
    mask: jax.Array,
    *,
    kl_coefficient: float | jax.Array,
    convention: Convention = "eos",
) -> jax.Array:
    """Return per-token rewards: ``-kl_coefficient * kl`` on response tokens, plus the score on the terminal column.

    scores: [B], after penalties. kl: [B, T], per-token estimate in nats. mask: bool [B, T], the response mask.
    Returns float32 [B, T], 0 elsewhere. Source: Ziegler et al. 2019, eq. 2, spread over tokens as in their code.

    Example: kl [.2, -.1, .5, -.1], coefficient .05, score 2, "eos": [-.01, .005, -.025, 2.005].
    """
    require_mask("shape_rewards", mask=mask)
    require_same_shape("shape_rewards", kl=kl, mask=mask)
    require_rows("shape_rewards", mask, scores=scores)
    require_within("shape_rewards", "kl_coefficient", kl_coefficient, 0.0)
    penalty = jnp.where(mask, -kl_coefficient * kl.astype(jnp.float32), 0.0)
    bonus = jnp.where(terminal_mask(mask, convention), scores.astype(jnp.float32)[..., None], 0.0)
    return penalty + bonus


def penalise_missing_eos(
    scores: jax.Array, ended: jax.Array, *, penalty: float, mode: MissingEos = "replace"
) -> jax.Array:
    """Lower the scores of responses that did not end. scores: [B]; ended: bool [B] -> float32 [B].

    "replace": the score of such a response becomes ``-penalty`` (Ziegler et al. 2019 and Huang et al. 2024 with penalty
    1: a reward model only means something on finished text). "subtract": ``score - penalty`` (TRL). penalty: >= 0, in
    units of the score.
    """
    require_mask("penalise_missing_eos", ended=ended)
    require_same_shape("penalise_missing_eos", scores=scores, ended=ended)
    if not penalty >= 0:
        raise InputError(f"missing-EOS penalty={penalty}: give its size, 0 or more (it is subtracted or negated)")
    scores = scores.astype(jnp.float32)
    if mode == "replace":
        return jnp.where(ended, scores, -penalty)
    if mode == "subtract":
        return jnp.where(ended, scores, scores - penalty)
    raise InputError(f"missing-EOS mode={mode!r}: use 'replace' or 'subtract'")


def group_advantages(
    scores: jax.Array,
    samples: int,
    *,
    kind: Literal["standardised", "centred", "leave_one_out"] = "standardised",
    epsilon: float = 1e-4,
    scored: jax.Array | None = None,
) -> jax.Array:
    """Return the advantage of every response over the other ``samples`` of its prompt, float32 [B].

    scores: [B], rows i * samples ... (i + 1) * samples - 1 are one group. "standardised": ``(R - mean) / (std + epsilon)``,
    std with samples - 1 in the denominator (Shao et al. 2024; all shipped implementations). "centred": ``R - mean`` (Liu et
    al. 2025). "leave_one_out": ``R - mean of the others`` (Ahmadian et al. 2024). scored: bool [B], the responses that have a
    score; the others belong to no group and have advantage 0, as has a response that is left alone. None = all.
    Raises InputError for groups of one, which have no baseline, and for scores that are no whole number of groups.

    Examples: [1, 0, 0, 1]: +-.865875; [1, 0, 0, 0]: 1.4997 and -.4999, centred .75 and -.25, leave_one_out 1 and -1/3.
    """
    if samples < 2:
        raise InputError(f"samples = {samples}: a response needs others of its prompt to compare with; take at least 2")
    if scores.ndim != 1 or scores.shape[0] % samples:
        raise InputError(f"group_advantages: scores {list(scores.shape)} are no groups of samples = {samples}")
    if kind not in ("standardised", "centred", "leave_one_out"):
        raise InputError(f"advantages = {kind!r}: use 'standardised', 'centred' or 'leave_one_out'")
    require_within("group_advantages", "epsilon", epsilon, 0.0)
    grouped = scores.astype(jnp.float32).reshape(-1, samples)
    if scored is not None:
        require_mask("group_advantages", scored=scored)
        require_same_shape("group_advantages", scores=scores, scored=scored)
        return _advantages_of_scored(grouped, scored.reshape(-1, samples), kind, epsilon).reshape(-1)
    centred = grouped - grouped.mean(axis=1, keepdims=True)
    if kind == "leave_one_out":
        centred = centred * (samples / (samples - 1))
    elif kind == "standardised":
        centred = centred / (grouped.std(axis=1, ddof=1, keepdims=True) + epsilon)
    # All scores alike: their mean may be off by a rounding error, which the division would make an advantage of 1e-3.
    even = (grouped == grouped[:, :1]).all(axis=1, keepdims=True)
    return jnp.where(even, 0.0, centred).reshape(-1)


def _advantages_of_scored(grouped: jax.Array, scored: jax.Array, kind: str, epsilon: float) -> jax.Array:
    """Return `group_advantages` when only scored responses belong to a group. Both [groups, samples]."""
    count = scored.sum(axis=1, keepdims=True).astype(jnp.float32)
    centred = grouped - grouped.mean(axis=1, keepdims=True, where=scored)
    if kind == "leave_one_out":
        centred = centred * (count / jnp.maximum(count - 1, 1.0))
    elif kind == "standardised":
        centred = centred / (grouped.std(axis=1, ddof=1, keepdims=True, where=scored) + epsilon)
    least = grouped.min(axis=1, keepdims=True, where=scored, initial=jnp.inf)
    most = grouped.max(axis=1, keepdims=True, where=scored, initial=-jnp.inf)
    return jnp.where(scored & (most > least), centred, 0.0)

"""Losses of a policy on preference pairs: DPO and its relatives, per pair. Reductions belong to the caller."""

from __future__ import annotations

from typing import Literal, get_args

import jax
import jax.numpy as jnp

from rlhf_jax.errors import InputError

PreferenceKind = Literal["sigmoid", "robust", "hinge", "ipo"]
PREFERENCE_KINDS: tuple[str, ...] = get_args(PreferenceKind)


def preference_loss(
    margins: jax.Array, *, beta: float, kind: PreferenceKind = "sigmoid", label_smoothing: float = 0.0
) -> jax.Array:
    """Return the loss of every pair from the margin of its implicit rewards.

    margins: float [...], ``(chosen - reference chosen) - (rejected - reference rejected)``, log-probabilities of whole
    responses (per token for the averaged IPO). Returns float32 [...]:

    - "sigmoid": ``-log sigmoid(beta D)`` (Rafailov et al. 2023, eq. 7); label_smoothing s > 0: ``-(1 - s) log sigmoid(beta
      D) - s log sigmoid(-beta D)``, conservative DPO (Mitchell 2023).
    - "robust": ``(-(1 - s) log sigmoid(beta D) + s log sigmoid(-beta D)) / (1 - 2 s)``, unbiased under labels that are
      flipped with probability s (Chowdhury et al. 2024).
    - "hinge": ``max(0, 1 - beta D)`` (Zhao et al. 2023, SLiC).
    - "ipo": ``(D - 1 / (2 beta))^2`` (Azar et al. 2024, eq. 17).

    Example, D = (-10 + 11) - (-12 + 11.5) = 1.5, beta .1: sigmoid .620957, with s = .1 .635957, robust .602207, hinge .85,
    ipo 12.25. D = 0 gives log 2 (sigmoid, robust). Raises InputError for another kind, and for a label_smoothing of half or
    more, which "robust" divides by 0 for.
    """
    if kind not in PREFERENCE_KINDS:
        raise InputError(f"preference_loss: kind = {kind!r}: one of {', '.join(map(repr, PREFERENCE_KINDS))}")
    if not beta > 0:
        raise InputError(f"preference_loss: beta = {beta!r}: give a number above 0")
    if not 0 <= label_smoothing < 0.5 or (label_smoothing and kind not in ("sigmoid", "robust")):
        raise InputError(
            f"preference_loss: label_smoothing = {label_smoothing!r}: give a share in [0, 0.5), and 0 with 'hinge' and 'ipo'"
        )
    margins = margins.astype(jnp.float32)
    scaled = beta * margins
    if kind == "sigmoid":
        return (1.0 - label_smoothing) * jax.nn.softplus(-scaled) + label_smoothing * jax.nn.softplus(scaled)
    if kind == "robust":
        debiased = (1.0 - label_smoothing) * jax.nn.softplus(-scaled) - label_smoothing * jax.nn.softplus(scaled)
        return debiased / (1.0 - 2.0 * label_smoothing)
    if kind == "hinge":
        return jax.nn.relu(1.0 - scaled)
    return jnp.square(margins - 1.0 / (2.0 * beta))

"""Toy rewards with a known optimum, to learn against."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax.types import Completions


def count_reward(completions: Completions, token: int) -> Float[Array, "B"]:  # noqa: F821  (jaxtyping axis name)
    """Count ``token`` among the counted response tokens. float32 [B]; optimum: every token is that one."""
    return ((completions.tokens == token) & completions.mask).sum(axis=1).astype(jnp.float32)


def table_reward(completions: Completions, table: Float[Array, "V"]) -> Float[Array, "B"]:  # noqa: F821
    """Read ``table`` at the FIRST response token, float32 [B]: a bandit with V arms, one response token being a pull.

    Under a KL penalty with coefficient b the optimal policy is known: proportional to reference(v) * exp(table[v] / b).
    """
    return jnp.asarray(table, jnp.float32)[completions.tokens[:, 0]]

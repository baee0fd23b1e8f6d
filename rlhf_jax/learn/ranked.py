"""Groups of responses: their rows as one batch of sequences, and which of them count."""

from __future__ import annotations

from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from rlhf_jax.batches import RankedBatch, TokenBatch
from rlhf_jax.errors import InputError
from rlhf_jax.types import Mean

_T = TypeVar("_T")


def rank_major(rows: _T) -> _T:
    """Flatten groups for one pass through a model: [B, K, ...] -> [K * B, ...], all rows with k = 0, then those with k = 1, ...
    Rows (a0, a1), (b0, b1) come as a0, b0, a1, b1."""
    flat: _T = jax.tree.map(lambda x: jnp.concatenate([x[:, k] for k in range(x.shape[1])]), rows)
    return flat


def pair_rows(batch: RankedBatch) -> TokenBatch:
    """Return the chosen rows and then the rejected ones, [2 * B, S]. Raises InputError for groups of another size than 2."""
    _require_pairs(batch)
    return rank_major(batch.rows)


def pair_halves(values: Array) -> tuple[Array, Array]:
    """Return (of the chosen rows, of the rejected ones), [B, ...] each, from what was read at `pair_rows`."""
    half = values.shape[0] // 2
    return values[:half], values[half:]


def pair_mask(batch: RankedBatch) -> Array:
    """Return which pairs count, bool [B]: those with both rows. Raises InputError for groups of another size than 2."""
    _require_pairs(batch)
    return batch.mask.all(axis=1)


def pair_mean(values: Array, batch: RankedBatch) -> Mean:
    """Return the mean of ``values`` [B] over pairs that count, by their weights: what a loss of pairs sums."""
    return Mean.weighted(values, pair_mask(batch), batch.weight)


def _require_pairs(batch: RankedBatch) -> None:
    if batch.mask.shape[1] != 2:
        raise InputError(f"RankedBatch: groups of {batch.mask.shape[1]} rows in a loss of pairs; give groups of 2")

"""Rows of different lengths read two by two: the longest with the shortest in one row, the second longest with the second
shortest, and so on, as segments that do not see each other. Fewer columns of padding go through the network; what comes out
has its old place.

`fold_width` decides on the host, from the lengths alone, whether that is worth it; a program has one shape for each width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

STEPS = 8
"""Widths are multiples of a row's columns over this: so few programs are compiled."""


def fold_width(lengths: np.ndarray, rows: int, columns: int) -> int | None:
    """Columns in which ANY ``rows`` of the sequences, rows of ``columns``, can be folded. None: folding them saves nothing.

    lengths: int [n], n >= rows. Of sorted lengths the longest ``rows`` need the most: each of any others is no longer than
    the one in its place. Lengths 8, 7, 3, 2, rows 4, columns 8: 8 + 2 and 7 + 3 need 10 columns of 16.
    """
    if rows % 2:
        return None
    top = np.sort(np.asarray(lengths))[::-1][:rows]
    step = max(1, columns // STEPS)
    width = -(-int((top + top[::-1]).max()) // step) * step
    return width if width < 2 * columns else None


def fold(
    tokens: Int32[Array, "B S"],
    positions: Int32[Array, "B S"],
    segment_ids: Int32[Array, "B S"],
    width: int,
    parts: int,
) -> tuple[tuple[Array, Array, Array], Int32[Array, "B S"], Bool[Array, " B"]]:
    """((tokens, positions, segment ids) [B / 2, width], the place of each column in its part, whether each row fits).

    parts: each block of B / parts rows is folded by itself, as devices that share the rows need it. Padding goes nowhere.
    """

    def one(tokens: Array, positions: Array, segment_ids: Array) -> tuple[tuple[Array, Array, Array], Array, Array]:
        rows, columns = tokens.shape
        held = segment_ids > 0
        lengths = held.sum(axis=1)
        order = jnp.argsort(-lengths, stable=True)
        rank = jnp.zeros(rows, jnp.int32).at[order].set(jnp.arange(rows, dtype=jnp.int32))
        second = rank >= rows // 2
        begin = jnp.where(second, lengths[order[rows - 1 - rank]], 0)
        fits = begin + lengths <= width
        nowhere = rows // 2 * width
        place = (jnp.minimum(rank, rows - 1 - rank) * width + begin)[:, None] + jnp.cumsum(held, axis=1) - 1
        place = jnp.where(held & fits[:, None], place, nowhere).astype(jnp.int32)

        def laid(values: Array) -> Array:
            return jnp.zeros(nowhere, jnp.int32).at[place].set(values, mode="drop").reshape(-1, width)

        apart = segment_ids + jnp.where(second, columns, 0)[:, None]
        return (laid(tokens), laid(positions), laid(apart)), place, fits

    blocks = [x.reshape(parts, -1, x.shape[1]) for x in (tokens, positions, segment_ids)]
    folded, place, fits = jax.vmap(one)(*blocks)
    whole = jax.tree.map(lambda x: x.reshape(-1, width), folded)
    return whole, place.reshape(tokens.shape), fits.reshape(-1)


def unfold(
    hidden: Float[Array, "half W D"], place: Int32[Array, "B S"], fits: Bool[Array, " B"], parts: int
) -> Float[Array, "B S D"]:
    """What `fold` put together, each column in its old place; padding is 0, a row that did not fit is NaN: a training step
    refuses it."""
    flat = hidden.reshape(parts, -1, hidden.shape[-1])
    take = jax.vmap(lambda rows, at: rows.at[at].get(mode="fill", fill_value=0))
    taken = take(flat, place.reshape(parts, -1, place.shape[1])).reshape(*place.shape, -1)
    return jnp.where(fits[:, None, None], taken, jnp.nan)

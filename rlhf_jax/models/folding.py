"""Rows of different lengths read two by two: the longest with the shortest in one row, the second longest with the second
shortest, and so on, as segments that do not see each other. Fewer columns of padding go through the network; what comes out
has its old place. And the tokens that are predicted moved together, so that there are logits of no others.

`fold_of` decides on the host, from the lengths alone, whether that is worth it; a program has one shape for each `Fold`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

WIDTHS, COUNTS = 16, 8
"""Of what rows can need, widths are multiples of a 32nd and counts of an eighth: so few programs are compiled."""


@dataclasses.dataclass(frozen=True)
class Fold:
    """How a program reads rows; hashable, for a static argument. columns: two rows in so many, None: as they come. targets:
    logits in so many columns, over which the tokens that are predicted are spread evenly (`Picked`), None: where they are."""

    columns: int | None = None
    targets: int | None = None


def fold_of(
    lengths: np.ndarray, rows: int, columns: int, targets: np.ndarray | None = None, target_columns: int = 0
) -> Fold | None:
    """A fold that ANY ``rows`` of the sequences, rows of ``columns``, fit. None: it would save nothing.

    lengths: int [n], n >= rows. Of sorted lengths the longest ``rows`` need the most: each of any others is no longer than
    the one in its place. Lengths 8, 7, 3, 2, rows 4, columns 8: 8 + 2 and 7 + 3 need 10 columns of 16. targets: int [n], how
    many tokens of each are predicted, of ``target_columns`` for which there would be logits.
    """
    columns_needed = targets_needed = None
    if rows % 2 == 0:
        top = np.sort(np.asarray(lengths))[::-1][:rows]
        width = _up(int((top + top[::-1]).max()), 2 * columns, 2 * WIDTHS)
        columns_needed = width if width < 2 * columns else None
    if targets is not None:
        most = int(np.sort(np.asarray(targets))[::-1][:rows].sum())
        spread = _up(-(-most // rows), target_columns, COUNTS)
        targets_needed = spread if spread < target_columns else None
    found = Fold(columns_needed, targets_needed)
    return None if found == Fold() else found


def _up(needed: int, most: int, steps: int) -> int:
    """``needed`` as a multiple of the ``steps``-th part of ``most``."""
    step = max(1, most // steps)
    return max(1, -(-needed // step)) * step


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


@dataclasses.dataclass(frozen=True)
class Picked:
    """The True entries of a mask [B, S], moved together in order over as many rows, [B, N]; each block of B / parts rows by
    itself. source: int32 [parts, B N / parts], where in its block each comes from (behind the last one any). held: bool [B, N].
    place: int32 [B, S], where in its block each went. fits: bool [parts, 1]."""

    source: Int32[Array, "P M"]
    held: Bool[Array, "B N"]
    place: Int32[Array, "B S"]
    fits: Bool[Array, "P 1"]

    @classmethod
    def of(cls, mask: Bool[Array, "B S"], columns: int, parts: int) -> Picked:
        """columns: N."""
        flat = mask.reshape(parts, -1)
        count = mask.shape[0] // parts * columns
        source = jnp.argsort(~flat, axis=1, stable=True)[:, :count].astype(jnp.int32)
        place = jnp.where(flat, jnp.cumsum(flat, axis=1) - 1, count).astype(jnp.int32)
        held = jnp.take_along_axis(flat, source, axis=1).reshape(-1, columns)
        return cls(source, held, place.reshape(mask.shape), flat.sum(axis=1, keepdims=True) <= count)

    def take(self, values: Array) -> Array:
        """[B, S, ...] -> [B, N, ...]."""
        flat = values.reshape(self.source.shape[0], -1, *values.shape[2:])
        taken: Array = jax.vmap(lambda rows, at: rows.at[at].get(unique_indices=True))(flat, self.source)
        return taken.reshape(*self.held.shape, *values.shape[2:])

    def put(self, values: Float[Array, "B N"]) -> Float[Array, "B S"]:
        """In their old places, 0 where the mask is False. In a block with more True entries than there is room for, those that had
        a place are NaN: a training step refuses them."""
        blocks, places = (x.reshape(self.source.shape[0], -1) for x in (values, self.place))
        blocks = jnp.where(self.fits, blocks, jnp.nan)
        found: Array = jax.vmap(lambda row, at: row.at[at].get(mode="fill", fill_value=0))(blocks, places)
        return found.reshape(self.place.shape)

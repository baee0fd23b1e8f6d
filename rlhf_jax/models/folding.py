"""Folding: rows of different lengths are combined in pairs, to compute fewer columns of padding.

The longest row shares a row with the shortest, the second longest with the second shortest, and so on, as separate
segments. The results are moved back to the original columns. The predicted tokens are also gathered, so that logits
exist only for them.

`fold_of` decides on the host, from the lengths alone, whether folding saves anything; there is one compiled program for
each `Fold`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

WIDTHS, COUNTS = 16, 8
"""Widths are rounded up to 1/32 of the longest possible row and counts to 1/8, so that few programs are compiled."""


@dataclasses.dataclass(frozen=True)
class Fold:
    """The shape of a folded batch; hashable, for a static argument.

    columns: width of the rows that hold two sequences each, None: not folded. targets: columns of logits per row, over
    which the predicted tokens are spread evenly (`Picked`), None: all columns.
    """

    columns: int | None = None
    targets: int | None = None


def fold_of(
    lengths: np.ndarray, rows: int, columns: int, targets: np.ndarray | None = None, target_columns: int = 0
) -> Fold | None:
    """Return a fold that fits any ``rows`` of the sequences, rows of ``columns``; None when it would save nothing.

    lengths: int [n], n >= rows. The longest ``rows`` need the most: sorted, each length of any other choice is no
    longer than the length at its place. Lengths 8, 7, 3, 2, rows 4, columns 8: 8 + 2 and 7 + 3 need 10 columns of 16.
    targets: int [n], predicted tokens of each sequence; without folding there are logits of ``target_columns`` columns.
    """
    columns_needed = targets_needed = None
    if rows % 2 == 0:
        top = np.sort(np.asarray(lengths))[::-1][:rows]
        width = _round_up(int((top + top[::-1]).max()), 2 * columns, 2 * WIDTHS)
        columns_needed = width if width < 2 * columns else None
    if targets is not None:
        most = int(np.sort(np.asarray(targets))[::-1][:rows].sum())
        spread = _round_up(-(-most // rows), target_columns, COUNTS)
        targets_needed = spread if spread < target_columns else None
    result = Fold(columns_needed, targets_needed)
    return None if result == Fold() else result


def _round_up(needed: int, most: int, steps: int) -> int:
    """Return ``needed`` rounded up to a multiple of the ``steps``-th part of ``most``."""
    step = max(1, most // steps)
    return max(1, -(-needed // step)) * step


def fold(
    tokens: Int32[Array, "B S"],
    positions: Int32[Array, "B S"],
    segment_ids: Int32[Array, "B S"],
    width: int,
    parts: int,
) -> tuple[tuple[Array, Array, Array], Int32[Array, "B S"], Bool[Array, " B"]]:
    """Return ((tokens, positions, segment ids) [B / 2, width], the place of each column in its part, whether each row fits).

    parts: each block of B / parts rows is folded separately, as required by devices that share the rows. Padding is
    dropped.
    """

    def fold_part(
        tokens: Array, positions: Array, segment_ids: Array
    ) -> tuple[tuple[Array, Array, Array], Array, Array]:
        rows, columns = tokens.shape
        is_token = segment_ids > 0
        lengths = is_token.sum(axis=1)
        order = jnp.argsort(-lengths, stable=True)
        rank = jnp.zeros(rows, jnp.int32).at[order].set(jnp.arange(rows, dtype=jnp.int32))
        second = rank >= rows // 2
        begin = jnp.where(second, lengths[order[rows - 1 - rank]], 0)
        fits = begin + lengths <= width
        nowhere = rows // 2 * width
        place = (jnp.minimum(rank, rows - 1 - rank) * width + begin)[:, None] + jnp.cumsum(is_token, axis=1) - 1
        place = jnp.where(is_token & fits[:, None], place, nowhere).astype(jnp.int32)

        def scatter(values: Array) -> Array:
            return jnp.zeros(nowhere, jnp.int32).at[place].set(values, mode="drop").reshape(-1, width)

        apart = segment_ids + jnp.where(second, columns, 0)[:, None]
        return (scatter(tokens), scatter(positions), scatter(apart)), place, fits

    blocks = [x.reshape(parts, -1, x.shape[1]) for x in (tokens, positions, segment_ids)]
    folded, place, fits = jax.vmap(fold_part)(*blocks)
    whole = jax.tree.map(lambda x: x.reshape(-1, width), folded)
    return whole, place.reshape(tokens.shape), fits.reshape(-1)


def unfold(
    hidden: Float[Array, "half W D"], place: Int32[Array, "B S"], fits: Bool[Array, " B"], parts: int
) -> Float[Array, "B S D"]:
    """Return the columns of a folded batch in their original places; padding is 0.

    A row that did not fit is NaN, which a training step rejects.
    """
    flat = hidden.reshape(parts, -1, hidden.shape[-1])
    gather = jax.vmap(lambda rows, at: rows.at[at].get(mode="fill", fill_value=0))
    unfolded = gather(flat, place.reshape(parts, -1, place.shape[1])).reshape(*place.shape, -1)
    return jnp.where(fits[:, None, None], unfolded, jnp.nan)


@dataclasses.dataclass(frozen=True)
class Picked:
    """The True entries of a mask [B, S], gathered in order over [B, N]; each block of B / parts rows separately.

    source: int32 [parts, B N / parts], the index of each entry in its block (arbitrary for entries past the last one).
    valid: bool [B, N].
    place: int32 [B, S], the index in its block to which each entry moved. fits: bool [parts, 1].
    """

    source: Int32[Array, "P M"]
    valid: Bool[Array, "B N"]
    place: Int32[Array, "B S"]
    fits: Bool[Array, "P 1"]

    @classmethod
    def of(cls, mask: Bool[Array, "B S"], columns: int, parts: int) -> Picked:
        """Return the entries of ``mask``. columns: N."""
        flat = mask.reshape(parts, -1)
        count = mask.shape[0] // parts * columns
        source = jnp.argsort(~flat, axis=1, stable=True)[:, :count].astype(jnp.int32)
        place = jnp.where(flat, jnp.cumsum(flat, axis=1) - 1, count).astype(jnp.int32)
        valid = jnp.take_along_axis(flat, source, axis=1).reshape(-1, columns)
        return cls(source, valid, place.reshape(mask.shape), flat.sum(axis=1, keepdims=True) <= count)

    def take(self, values: Array) -> Array:
        """Gather [B, S, ...] -> [B, N, ...]."""
        flat = values.reshape(self.source.shape[0], -1, *values.shape[2:])
        gathered: Array = jax.vmap(lambda rows, at: rows.at[at].get(unique_indices=True))(flat, self.source)
        return gathered.reshape(*self.valid.shape, *values.shape[2:])

    def put(self, values: Float[Array, "B N"]) -> Float[Array, "B S"]:
        """Return values at their original places, 0 where the mask is False.

        In a block with more True entries than there is room for, the entries that have a place are NaN, which a
        training step rejects.
        """
        blocks, places = (x.reshape(self.source.shape[0], -1) for x in (values, self.place))
        blocks = jnp.where(self.fits, blocks, jnp.nan)
        scattered: Array = jax.vmap(lambda row, at: row.at[at].get(mode="fill", fill_value=0))(blocks, places)
        return scattered.reshape(self.place.shape)

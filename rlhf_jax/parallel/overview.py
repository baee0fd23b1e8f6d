"""A table of parameters: names, shapes, counts, bytes and shardings."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

HEADER = ("parameter", "shape", "dtype", "count", "bytes", "bytes a device", "sharding")


def parameter_table(trees: dict[str, Any]) -> str:
    """Return a line for each array of ``trees``, {name: tree of arrays}, columns aligned, and the sums of each tree.

    bytes a device: of the largest shard. sharding: the mesh axes of each dimension, "-" for a dimension that is not split.
    """
    rows: list[tuple[str, ...]] = [HEADER]
    for name, tree in trees.items():
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        rows += [
            _row(f"{name}/{jax.tree_util.keystr(path, simple=True, separator='/')}", leaf) for path, leaf in leaves
        ]
        counts = [math.prod(leaf.shape) for _, leaf in leaves]
        sizes = [_size(leaf, leaf.shape) for _, leaf in leaves]
        shards = [_shard_size(leaf) for _, leaf in leaves]
        rows.append((f"{name}: all", "", "", f"{sum(counts):,}", f"{sum(sizes):,}", f"{sum(shards):,}", ""))
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines) + "\n"


def parameter_summary(trees: dict[str, Any]) -> str:
    """Return one line: the number of parameters of each tree and its share of all, with the bytes in all and on a device."""
    leaves = {name: jax.tree.leaves(tree) for name, tree in trees.items()}
    counts = {name: sum(math.prod(leaf.shape) for leaf in tree) for name, tree in leaves.items()}
    total, parts = max(sum(counts.values()), 1), []
    for name, tree in leaves.items():
        whole = sum(_size(leaf, leaf.shape) for leaf in tree)
        shard = sum(map(_shard_size, tree))
        share = f" ({counts[name] / total:.1%})" if len(trees) > 1 else ""
        parts.append(
            f"{name} {counts[name]:,} parameters{share}, {whole / 2**20:,.1f} MiB, {shard / 2**20:,.1f} MiB a device"
        )
    return "; ".join(parts)


def _row(name: str, leaf: Any) -> tuple[str, ...]:
    spec = getattr(leaf.sharding, "spec", ())
    axes = [*spec, *[None] * (len(leaf.shape) - len(spec))]
    split = " x ".join("-" if axis is None else axis if isinstance(axis, str) else "+".join(axis) for axis in axes)
    sizes = (math.prod(leaf.shape), _size(leaf, leaf.shape), _shard_size(leaf))
    shape = " x ".join(map(str, leaf.shape)) or "1"
    return (name, shape, str(leaf.dtype), *(f"{size:,}" for size in sizes), split or "-")


def _shard_size(leaf: Any) -> int:
    return _size(leaf, leaf.sharding.shard_shape(leaf.shape))


def _size(leaf: Any, shape: tuple[int, ...]) -> int:
    width = 8 if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize
    return math.prod(shape) * int(width)

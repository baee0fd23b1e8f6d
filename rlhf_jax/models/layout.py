"""The interface through which the decoder shards its activations (`parallel.ActivationConstraint` implements it)."""

from __future__ import annotations

from typing import Any, Protocol

import jax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array


class Constrain(Protocol):
    """A function of (activation, logical axis names) that returns the activation with its sharding constrained."""

    def __call__(self, x: Array, axes: tuple[str, ...]) -> Array: ...

    @property
    def mesh(self) -> Mesh | None:
        """None: a single device, or shardings left to the compiler."""

    def spec(self, axes: tuple[str, ...], shape: tuple[int, ...]) -> PartitionSpec:
        """Return the mesh axes of an activation of this shape; dimensions that do not divide are not split."""

    def parts(self, axis: str) -> int:
        """Return the number of devices that split a dimension with this logical axis."""


class Unconstrained:
    """A `Constrain` that leaves every sharding to the compiler."""

    mesh: Mesh | None = None

    def __call__(self, x: Array, axes: tuple[str, ...]) -> Array:
        del axes
        return x

    def spec(self, axes: tuple[str, ...], shape: tuple[int, ...]) -> PartitionSpec:
        del axes, shape
        return PartitionSpec()

    def parts(self, axis: str) -> int:
        del axis
        return 1


unconstrained = Unconstrained()


def axis_names(entry: Any) -> tuple[str, ...]:
    """Return the mesh axes of an entry of a PartitionSpec."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def reduce_scatter(x: Array, axis: str, mesh: Mesh) -> Array:
    """Sum over the devices along ``axis`` inside a shard_map; each device keeps its part of the first dimension."""
    if mesh.devices.flat[0].platform == "cpu":
        # Between processes Gloo's reduce-scatter times out after 30 s, and the limit cannot be changed.
        return local_part(jax.lax.psum(x, axis), axis, mesh)
    scattered: Array = jax.lax.psum_scatter(x, axis, tiled=True)
    return scattered


def local_part(whole: Array, axis: str, mesh: Mesh) -> Array:
    """Return, inside a shard_map, a device's part of the first dimension along ``axis``."""
    size = whole.shape[0] // mesh.shape[axis]
    own: Array = jax.lax.dynamic_slice_in_dim(whole, jax.lax.axis_index(axis) * size, size)
    return own

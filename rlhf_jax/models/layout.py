"""What the decoder asks of whoever lays its activations out over a mesh (`parallel.ActivationConstraint`)."""

from __future__ import annotations

from typing import Any, Protocol

import jax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array


class Constrain(Protocol):
    """Called with (activation, logical axis names) it gives the same activation with its sharding constrained."""

    def __call__(self, x: Array, axes: tuple[str, ...]) -> Array: ...

    @property
    def mesh(self) -> Mesh | None:
        """None: one device, or left to the compiler."""

    def spec(self, axes: tuple[str, ...], shape: tuple[int, ...]) -> PartitionSpec:
        """How an activation of this shape lies on the mesh; axes that do not divide are whole."""

    def parts(self, axis: str) -> int:
        """Over how many devices a dimension with this logical axis is split."""


class Unconstrained:
    """Leaves every sharding to the compiler."""

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
    """The mesh axes of an entry of a PartitionSpec."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def scattered_sum(x: Array, axis: str, mesh: Mesh) -> Array:
    """Inside a shard_map: the sum over the devices along ``axis``, of which each keeps its part of the first dimension."""
    if mesh.devices.flat[0].platform == "cpu":
        # Between processes Gloo's reduce-scatter waits 30 s for the others, and cannot be told to wait longer.
        return own_part(jax.lax.psum(x, axis), axis, mesh)
    scattered: Array = jax.lax.psum_scatter(x, axis, tiled=True)
    return scattered


def own_part(whole: Array, axis: str, mesh: Mesh) -> Array:
    """Inside a shard_map: the part of the first dimension that a device has along ``axis``."""
    size = whole.shape[0] // mesh.shape[axis]
    own: Array = jax.lax.dynamic_slice_in_dim(whole, jax.lax.axis_index(axis) * size, size)
    return own

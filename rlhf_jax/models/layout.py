"""What the decoder asks of whoever lays its activations out over a mesh (`parallel.ActivationConstraint`)."""

from __future__ import annotations

from typing import Protocol

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

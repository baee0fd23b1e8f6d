"""Device meshes: which devices there are along which named axis."""

from __future__ import annotations

import dataclasses
import math

import jax
from jax.sharding import AxisType, Mesh

from rlhf_jax.types import InputError

AXES = ("data", "fsdp", "tensor")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; exactly one may be -1 (all that are left).

    data: copies of the parameters, batch split over them. fsdp: parameters and batch split. tensor: heads, feed-forward
    columns and vocabulary split.
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1

    def __post_init__(self) -> None:
        sizes = [getattr(self, axis) for axis in AXES]
        for axis, size in zip(AXES, sizes, strict=True):
            if isinstance(size, bool) or not isinstance(size, int) or size == 0 or size < -1:
                raise InputError(f"MeshConfig.{axis} = {size!r}: give a positive number of devices, or -1 for the rest")
        if sizes.count(-1) > 1:
            raise InputError(f"MeshConfig: {sizes} has more than one -1; name all axes but one")


def remake_mesh(config: MeshConfig, mesh: Mesh) -> Mesh:
    """The devices of ``mesh`` in the same order under another shape: arrays go from one to the other on the devices."""
    sizes = _sizes(config, mesh.size)
    return Mesh(mesh.devices.reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh over ``devices`` (all when None) with axes `AXES`, left to the compiler (Auto).

    Raises InputError when the devices do not divide into the shape.
    """
    devices = jax.devices() if devices is None else devices
    sizes = _sizes(config, len(devices))
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def _sizes(config: MeshConfig, count: int) -> tuple[int, ...]:
    """Of the axes over ``count`` devices. Raises InputError when they do not divide."""
    sizes = [getattr(config, axis) for axis in AXES]
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes:
        if count % known:
            raise InputError(
                f"MeshConfig: {count} devices do not divide by {known} ({dict(zip(AXES, sizes, strict=True))})"
            )
        sizes[sizes.index(-1)] = count // known
    elif known != count:
        raise InputError(f"MeshConfig: {dict(zip(AXES, sizes, strict=True))} needs {known} devices, there are {count}")
    return tuple(sizes)

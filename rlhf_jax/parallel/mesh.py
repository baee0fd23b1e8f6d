"""Device meshes: the devices along each named axis."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from rlhf_jax.errors import InputError
from rlhf_jax.parallel.connections import connect_devices

AXES = ("data", "fsdp", "expert", "sequence", "tensor")
"""Axes in the order of communication between their devices, least first: neighbours are along the last axis."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The number of devices along each axis; at most one may be -1 (all remaining devices).

    data: copies of the parameters, the batch is split over them. fsdp: parameters and batch are split. tensor: heads,
    feed-forward columns and vocabulary are split. sequence: the columns of long rows are split (ring attention),
    parameters are copied. expert: the batch and the experts of a mixture are split; other parameters are copied.
    dcn_data, dcn_fsdp: with several TPU slices, the number of slices along data and fsdp (a divisor of the axis):
    slices are connected by the data centre's network, chips of a slice by their own links. Without slices: the number
    of processes.
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    sequence: int = 1
    expert: int = 1
    dcn_data: int = 1
    dcn_fsdp: int = 1

    def __post_init__(self) -> None:
        sizes = [getattr(self, axis) for axis in AXES]
        for axis, size in zip(AXES, sizes, strict=True):
            if isinstance(size, bool) or not isinstance(size, int) or size == 0 or size < -1:
                raise InputError(f"MeshConfig.{axis} = {size!r}: give a positive number of devices, or -1 for the rest")
        for name in ("dcn_data", "dcn_fsdp"):
            size = getattr(self, name)
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise InputError(f"MeshConfig.{name} = {size!r}: give a positive number of slices")
        if sizes.count(-1) > 1:
            raise InputError(f"MeshConfig: {sizes} has more than one -1; name all axes but one")


def remake_mesh(config: MeshConfig, mesh: Mesh) -> Mesh:
    """Return a mesh of the devices of ``mesh`` in the same order with another shape: arrays move between both on the devices."""
    sizes = _sizes(config, mesh.size)
    reshaped = Mesh(mesh.devices.reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    connect_devices(reshaped)
    return reshaped


def mesh_between(source: Mesh, target: Mesh) -> Mesh | None:
    """Return an intermediate mesh between two shapes of the same devices that splits tensor more; None when there is none.

    fsdp 8 to data 4, tensor 2: at fsdp 4, tensor 2 two neighbours have exchanged rows of their blocks for columns, and
    the four blocks of rows are then gathered. In a single step GSPMD does not find this way and holds the whole array.
    """
    more, remainder = divmod(target.shape["tensor"], source.shape["tensor"])
    idle = all(mesh.shape[axis] == 1 for mesh in (source, target) for axis in ("expert", "sequence"))
    if remainder or more == 1 or not idle or source.shape["fsdp"] % more:
        return None
    sizes = source.shape | {"fsdp": source.shape["fsdp"] // more, "tensor": target.shape["tensor"]}
    return Mesh(source.devices.reshape([sizes[axis] for axis in AXES]), AXES, axis_types=source.axis_types)


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """Return a mesh over ``devices`` (all when None) with axes `AXES`, shardings left to the compiler (Auto).

    Raises InputError when the devices do not divide into the shape, or their slices into its dcn sizes.
    """
    devices = jax.devices() if devices is None else devices
    sizes, kinds = _sizes(config, len(devices)), (AxisType.Auto,) * len(AXES)
    if len(_granules(devices, "slice_index")) == 1 and config.dcn_data == config.dcn_fsdp == 1:
        mesh = jax.make_mesh(sizes, AXES, axis_types=kinds, devices=devices)
    else:
        mesh = Mesh(hybrid_devices(config, devices), AXES, axis_types=kinds)
    connect_devices(mesh)
    return mesh


def hybrid_devices(config: MeshConfig, devices: list[Any]) -> np.ndarray:
    """Return devices of several slices (or processes, where there are no slices) as an array over `AXES`.

    A step along data or fsdp leaves the slice as rarely as dcn_data and dcn_fsdp allow, a step along another axis never
    does. Two slices of four chips, data 4, dcn_data 2, tensor 2: data 0 and 1 are the first slice, 2 and 3 the second.
    """
    sizes = dict(zip(AXES, _sizes(config, len(devices)), strict=True))
    outer = {axis: {"data": config.dcn_data, "fsdp": config.dcn_fsdp}.get(axis, 1) for axis in AXES}
    attribute = "slice_index" if len(_granules(devices, "slice_index")) > 1 else "process_index"
    word = {"slice_index": "slices", "process_index": "processes"}[attribute]
    granules = _granules(devices, attribute)
    if config.dcn_data * config.dcn_fsdp != len(granules):
        raise InputError(
            f"MeshConfig.dcn_data = {config.dcn_data}, dcn_fsdp = {config.dcn_fsdp}: the devices are {len(granules)} "
            f"{word}; their product must be that"
        )
    if len(set(granules.values())) > 1:
        raise InputError(f"MeshConfig: {word} of {sorted(granules.values())} devices; they must be equal")
    for axis in ("data", "fsdp"):
        if sizes[axis] % outer[axis]:
            raise InputError(f"MeshConfig.{axis} = {sizes[axis]} does not divide by dcn_{axis} = {outer[axis]}")
    array: np.ndarray = mesh_utils.create_hybrid_device_mesh(
        [sizes[axis] // outer[axis] for axis in AXES],
        list(outer.values()),
        devices,
        process_is_granule=attribute == "process_index",
        allow_split_physical_axes=devices[0].platform == "tpu",
    )
    return array


def _granules(devices: list[Any], attribute: str) -> dict[int, int]:
    """Return the number of devices of each slice (or process); a single one when devices have no such attribute."""
    counts: dict[int, int] = {}
    for device in devices:
        key = getattr(device, attribute, 0)
        counts[key] = counts.get(key, 0) + 1
    return counts


def _sizes(config: MeshConfig, count: int) -> tuple[int, ...]:
    """Return the sizes of the axes over ``count`` devices. Raises InputError when they do not divide."""
    sizes = [getattr(config, axis) for axis in AXES]
    product = math.prod(size for size in sizes if size != -1)
    if -1 in sizes:
        if count % product:
            raise InputError(
                f"MeshConfig: {count} devices do not divide by {product} ({dict(zip(AXES, sizes, strict=True))})"
            )
        sizes[sizes.index(-1)] = count // product
    elif product != count:
        raise InputError(
            f"MeshConfig: {dict(zip(AXES, sizes, strict=True))} needs {product} devices, there are {count}"
        )
    return tuple(sizes)

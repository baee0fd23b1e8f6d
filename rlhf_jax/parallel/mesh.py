"""Device meshes: which devices there are along which named axis."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from rlhf_jax.errors import InputError
from rlhf_jax.parallel.meeting import meet

AXES = ("data", "fsdp", "expert", "sequence", "tensor")
"""From the least to the most that devices along an axis have to say to each other: neighbours in the last."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; exactly one may be -1 (all that are left).

    data: copies of the parameters, batch split over them. fsdp: parameters and batch split. tensor: heads, feed-forward
    columns and vocabulary split. sequence: the columns of long rows split (ring attention), parameters copied. expert:
    batch split, and the experts of a mixture; other parameters copied.
    dcn_data, dcn_fsdp: of several TPU slices, how many lie along data and fsdp (a divisor of the axis): between slices
    there is the data centre's network, between chips of a slice their own links. Without slices: of several processes.
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
    """The devices of ``mesh`` in the same order under another shape: arrays go from one to the other on the devices."""
    sizes = _sizes(config, mesh.size)
    made = Mesh(mesh.devices.reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    meet(made)
    return made


def mesh_between(here: Mesh, there: Mesh) -> Mesh | None:
    """A stop on the way from one shape to another of the same devices that splits tensor more; None when there is none.

    fsdp 8 to data 4, tensor 2: at fsdp 4, tensor 2 two neighbours have exchanged rows of their blocks for columns, and the
    four blocks of rows are then gathered. In one step GSPMD finds no such way and holds the whole array.
    """
    more, rest = divmod(there.shape["tensor"], here.shape["tensor"])
    idle = all(mesh.shape[axis] == 1 for mesh in (here, there) for axis in ("expert", "sequence"))
    if rest or more == 1 or not idle or here.shape["fsdp"] % more:
        return None
    sizes = here.shape | {"fsdp": here.shape["fsdp"] // more, "tensor": there.shape["tensor"]}
    return Mesh(here.devices.reshape([sizes[axis] for axis in AXES]), AXES, axis_types=here.axis_types)


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh over ``devices`` (all when None) with axes `AXES`, left to the compiler (Auto).

    Raises InputError when the devices do not divide into the shape, or their slices into its dcn sizes.
    """
    devices = jax.devices() if devices is None else devices
    sizes, kinds = _sizes(config, len(devices)), (AxisType.Auto,) * len(AXES)
    if len(_granules(devices, "slice_index")) == 1 and config.dcn_data == config.dcn_fsdp == 1:
        made = jax.make_mesh(sizes, AXES, axis_types=kinds, devices=devices)
    else:
        made = Mesh(hybrid_devices(config, devices), AXES, axis_types=kinds)
    meet(made)
    return made


def hybrid_devices(config: MeshConfig, devices: list[Any]) -> np.ndarray:
    """Devices of several slices (of several processes where there are no slices) as an array over `AXES`: a step along
    data or fsdp leaves the slice as rarely as dcn_data and dcn_fsdp allow, a step along another axis never does.

    Two slices of four chips, data 4, dcn_data 2, tensor 2: data 0 and 1 are the first slice, 2 and 3 the second.
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
    made: np.ndarray = mesh_utils.create_hybrid_device_mesh(
        [sizes[axis] // outer[axis] for axis in AXES],
        list(outer.values()),
        devices,
        process_is_granule=attribute == "process_index",
        allow_split_physical_axes=devices[0].platform == "tpu",
    )
    return made


def _granules(devices: list[Any], attribute: str) -> dict[int, int]:
    """How many devices each slice (or process) has; one of them all where devices do not say."""
    counts: dict[int, int] = {}
    for device in devices:
        key = getattr(device, attribute, 0)
        counts[key] = counts.get(key, 0) + 1
    return counts


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

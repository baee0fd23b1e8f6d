"""Shapes of meshes, and configurations that are rejected."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from rlhf_jax.errors import InputError
from rlhf_jax.parallel import AXES, MeshConfig, make_mesh
from rlhf_jax.parallel.mesh import hybrid_devices


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MeshConfig(), (1, 8, 1, 1, 1)),
        (MeshConfig(data=-1, fsdp=1), (8, 1, 1, 1, 1)),
        (MeshConfig(data=2, fsdp=-1, tensor=2), (2, 2, 1, 1, 2)),
        (MeshConfig(data=2, fsdp=4, tensor=1), (2, 4, 1, 1, 1)),
        (MeshConfig(data=1, fsdp=1, tensor=-1), (1, 1, 1, 1, 8)),
        (MeshConfig(sequence=2, expert=4), (1, 1, 4, 2, 1)),
        (MeshConfig(fsdp=2, sequence=-1), (1, 2, 1, 4, 1)),
    ],
)
def test_shapes(config, shape):
    mesh = make_mesh(config)
    assert mesh.axis_names == AXES == ("data", "fsdp", "expert", "sequence", "tensor")
    assert tuple(mesh.shape[axis] for axis in AXES) == shape
    assert mesh.axis_types == (AxisType.Auto,) * 5
    assert sorted(device.id for device in mesh.devices.flat) == list(range(8))


def test_some_of_the_devices():
    mesh = make_mesh(MeshConfig(data=2, fsdp=-1), jax.devices()[4:8])
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "expert": 1, "sequence": 1, "tensor": 1}
    assert sorted(device.id for device in mesh.devices.flat) == [4, 5, 6, 7]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(data=3), "8 devices do not divide by 3"),
        (MeshConfig(data=1, fsdp=4), "needs 4 devices, there are 8"),
        (MeshConfig(data=4, fsdp=4), "needs 16 devices, there are 8"),
    ],
)
def test_devices_that_do_not_fit(config, message):
    with pytest.raises(InputError, match=message) as error:
        make_mesh(config)
    assert "'data'" in str(error.value)  # the whole shape is named


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data": 0}, r"MeshConfig\.data = 0"),
        ({"tensor": -2}, r"MeshConfig\.tensor = -2"),
        ({"fsdp": 2.0}, r"MeshConfig\.fsdp = 2\.0"),
        ({"data": True}, r"MeshConfig\.data = True"),
        ({"data": -1}, "more than one -1"),
        ({"sequence": 0}, r"MeshConfig\.sequence = 0"),
        ({"expert": "2"}, r"MeshConfig\.expert = '2'"),
        ({"dcn_data": -1}, r"MeshConfig\.dcn_data = -1"),
        ({"dcn_fsdp": 1.5}, r"MeshConfig\.dcn_fsdp = 1\.5"),
    ],
)
def test_bad_sizes_are_named(fields, message):
    with pytest.raises(InputError, match=message):
        MeshConfig(**fields)


# ---- several slices


@dataclasses.dataclass(frozen=True)
class Chip:
    """A stand-in for a device with the attributes that `mesh_utils` reads."""

    id: int
    process_index: int
    slice_index: int = 0
    platform: str = "simulated"
    device_kind: str = "simulated"


def chips(count: int, slices: int) -> list[Chip]:
    """Return chips, two per process, slices one after another."""
    return [Chip(i, i // 2, i // (count // slices)) for i in range(count)]


def along(config: MeshConfig, devices: list[Chip], axis: str, attribute: str = "slice_index") -> list[int]:
    """Return the slice of each device along ``axis`` from the first corner of the mesh."""
    line = np.moveaxis(hybrid_devices(config, devices), AXES.index(axis), 0)
    return [getattr(device, attribute) for device in line.reshape(line.shape[0], -1)[:, 0]]


def test_slices_are_along_data_and_other_axes_inside_a_slice() -> None:
    config = MeshConfig(data=4, fsdp=2, tensor=2, dcn_data=2)
    devices = chips(16, 2)
    assert along(config, devices, "data") == [0, 0, 1, 1]
    assert along(config, devices, "fsdp") == along(config, devices, "tensor") == [0, 0]
    devices_by_axis = hybrid_devices(config, devices)
    assert devices_by_axis.shape == (4, 2, 1, 1, 2) and sorted(chip.id for chip in devices_by_axis.flat) == list(
        range(16)
    )


def test_slices_along_fsdp_and_along_both() -> None:
    assert along(MeshConfig(fsdp=8, dcn_fsdp=2), chips(8, 2), "fsdp") == [0] * 4 + [1] * 4
    config = MeshConfig(data=2, fsdp=4, dcn_data=2, dcn_fsdp=2)
    assert along(config, chips(8, 4), "data") == [0, 2] and along(config, chips(8, 4), "fsdp") == [0, 0, 1, 1]


def test_processes_are_the_slices_of_devices_without_slices() -> None:
    config = MeshConfig(data=4, fsdp=2, dcn_data=4)
    assert along(config, chips(8, 1), "data", "process_index") == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("config", "devices", "message"),
    [
        (MeshConfig(), chips(8, 2), "dcn_data = 1, dcn_fsdp = 1: the devices are 2 slices; their product must be that"),
        (MeshConfig(dcn_data=2, data=2), chips(8, 4), "the devices are 4 slices"),
        (MeshConfig(data=1, dcn_data=2), chips(8, 2), r"MeshConfig\.data = 1 does not divide by dcn_data = 2"),
        (MeshConfig(data=2, dcn_data=2), [*chips(6, 2)[:5], Chip(9, 0, 0)], r"slices of \[2, 4\] devices"),
    ],
)
def test_slices_that_do_not_fit(config: MeshConfig, devices: list[Chip], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_mesh(config, devices)


def test_slices_of_devices_without_slices_are_an_error() -> None:
    with pytest.raises(InputError, match="the devices are 1 processes"):
        make_mesh(MeshConfig(data=2, dcn_data=2))

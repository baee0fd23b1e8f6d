"""Shapes of meshes, and what is refused."""

from __future__ import annotations

import jax
import pytest
from jax.sharding import AxisType

from rlhf_jax.parallel import AXES, MeshConfig, make_mesh
from rlhf_jax.types import InputError


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MeshConfig(), (1, 8, 1)),
        (MeshConfig(data=-1, fsdp=1), (8, 1, 1)),
        (MeshConfig(data=2, fsdp=-1, tensor=2), (2, 2, 2)),
        (MeshConfig(data=2, fsdp=4, tensor=1), (2, 4, 1)),
        (MeshConfig(data=1, fsdp=1, tensor=-1), (1, 1, 8)),
    ],
)
def test_shapes(config, shape):
    mesh = make_mesh(config)
    assert mesh.axis_names == AXES == ("data", "fsdp", "tensor")
    assert tuple(mesh.shape[axis] for axis in AXES) == shape
    assert mesh.axis_types == (AxisType.Auto,) * 3
    assert sorted(device.id for device in mesh.devices.flat) == list(range(8))


def test_some_of_the_devices():
    mesh = make_mesh(MeshConfig(data=2, fsdp=-1), jax.devices()[4:8])
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 1}
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
    ],
)
def test_bad_sizes_are_refused_by_name(fields, message):
    with pytest.raises(InputError, match=message):
        MeshConfig(**fields)

"""Many devices on one CPU: meshes for tests, and how much each device holds."""

from __future__ import annotations

import os
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rlhf_jax.errors import InputError
from rlhf_jax.parallel import MeshConfig, make_mesh

MESHES_OF_EIGHT = {"data": (8, 1, 1), "fsdp": (1, 8, 1), "all": (2, 2, 2)}
"""(data, fsdp, tensor) of meshes over eight devices; `tiny_config` divides over each."""


def pretend_devices(count: int) -> None:
    """Make one CPU look like ``count`` devices, for the first lines of a conftest.py.

    Raises InputError when JAX has started already: the number of devices is then fixed.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["NPROC"] = str(4 * count)  # threads of XLA's pool: a collective holds one until every device has come
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError as error:
        raise InputError(f"pretend_devices({count}): JAX has started already; call it before anything else") from error


def mesh_of(data: int = 1, fsdp: int = 1, tensor: int = 1, sequence: int = 1, expert: int = 1) -> Mesh:
    """Return a mesh over the first data * fsdp * tensor * sequence * expert devices. Raises InputError when there are fewer."""
    count = data * fsdp * tensor * sequence * expert
    if count > len(jax.devices()):
        raise InputError(f"mesh_of: needs {count} devices, there are {len(jax.devices())}; see pretend_devices")
    return make_mesh(MeshConfig(data, fsdp, tensor, sequence, expert), jax.devices()[:count])


def bytes_per_device(tree: Any) -> dict[int, int]:
    """Return the bytes of the arrays of ``tree`` on each device, by device id. Replicated data counts on every device."""
    device_bytes: dict[int, int] = {}
    for leaf in jax.tree.leaves(tree):
        raw = jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        for shard in raw.addressable_shards:
            device_bytes[shard.device.id] = device_bytes.get(shard.device.id, 0) + shard.data.nbytes
    return device_bytes

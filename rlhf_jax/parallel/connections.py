"""Connections between the processes of a run, made before anything is compiled that could delay one of them.

With Gloo collectives (CPUs), a set of devices is connected at its first collective, and every process must arrive within 30 s;
that limit cannot be changed. A process that compiled longer than another by more than that ended the run ("Gloo context
initialization failed: ... GetKeyValue() timed out"). Existing connections wait for 30 minutes
(xla_cpu_collective_timeout_seconds). Therefore every set of devices of a mesh runs one collective when the mesh is made, after
a barrier of the coordinator.
"""

from __future__ import annotations

import functools
import itertools

import jax
import numpy as np
from jax._src.distributed import global_state  # a barrier that is no collective has no public name
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlhf_jax.errors import InputError

BARRIER_MINUTES = 15
_barrier_numbers = itertools.count()


def connect_devices(mesh: Mesh) -> None:
    """Connect the devices along every set of axes of ``mesh``, and the processes.

    Runs once for each mesh over all devices; does nothing for one process or for devices that are not CPUs. Raises
    InputError when a process does not arrive within `BARRIER_MINUTES`.
    """
    if jax.process_count() == 1 or mesh.size != jax.device_count() or mesh.devices.flat[0].platform != "cpu":
        return
    _connect_devices(mesh)
    by_process = sorted(
        mesh.devices.flat, key=lambda device: (device.process_index, device.id)
    )  # the order of multihost_utils
    _connect_devices(Mesh(np.array(by_process).reshape(jax.process_count(), -1), ("processes", "local_devices")))


@functools.cache
def _connect_devices(mesh: Mesh) -> None:
    axes = [axis for axis, size in mesh.shape.items() if size > 1]
    sets = [chosen for count in range(1, len(axes) + 1) for chosen in itertools.combinations(axes, count)]
    everywhere = PartitionSpec(tuple(axes))

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False)
    def sum_over_sets(x: jax.Array) -> list[jax.Array]:
        return [jax.lax.psum(x, chosen) for chosen in sets]

    numbers = jax.make_array_from_callback(
        (mesh.size,), NamedSharding(mesh, everywhere), lambda index: np.zeros(mesh.size, np.int32)[index]
    )
    compiled = jax.jit(sum_over_sets).lower(numbers).compile()
    assert global_state.client is not None  # there are several processes
    try:
        global_state.client.wait_at_barrier(f"connect {next(_barrier_numbers)}", BARRIER_MINUTES * 60_000)
    except jax.errors.JaxRuntimeError as error:
        raise InputError(
            f"--distributed: the other processes did not connect in time: {str(error).splitlines()[0]}"
        ) from error
    jax.block_until_ready(compiled(numbers))

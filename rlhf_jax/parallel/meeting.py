"""The processes of a run meet before anything is compiled that would make one of them late.

Where Gloo carries the collectives (CPUs), a set of devices gets its connections at its first collective, and every process has
30 s to come to it; nothing sets that limit. A process that compiles longer than another by more than that on busy cores ended
the run ("Gloo context initialization failed: ... GetKeyValue() timed out"). Connections once made wait for 30 minutes
(xla_cpu_collective_timeout_seconds). So the sets of devices that a mesh names speak once when it is made, behind a barrier of
the coordinator.
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
_meetings = itertools.count()


def meet(mesh: Mesh) -> None:
    """Connect the devices along every set of axes of ``mesh``, and the processes. Once for each mesh over all devices; nothing to
    do for one process, or for devices that are no CPUs. Raises InputError when a process does not come within `BARRIER_MINUTES`."""
    if jax.process_count() == 1 or mesh.size != jax.device_count() or mesh.devices.flat[0].platform != "cpu":
        return
    _meet(mesh)
    by_process = sorted(
        mesh.devices.flat, key=lambda device: (device.process_index, device.id)
    )  # as multihost_utils has them
    _meet(Mesh(np.array(by_process).reshape(jax.process_count(), -1), ("processes", "local_devices")))


@functools.cache
def _meet(mesh: Mesh) -> None:
    axes = [axis for axis, size in mesh.shape.items() if size > 1]
    sets = [chosen for count in range(1, len(axes) + 1) for chosen in itertools.combinations(axes, count)]
    everywhere = PartitionSpec(tuple(axes))

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False)
    def speak(x: jax.Array) -> list[jax.Array]:
        return [jax.lax.psum(x, chosen) for chosen in sets]

    numbers = jax.make_array_from_callback(
        (mesh.size,), NamedSharding(mesh, everywhere), lambda index: np.zeros(mesh.size, np.int32)[index]
    )
    compiled = jax.jit(speak).lower(numbers).compile()
    assert global_state.client is not None  # there are several processes
    try:
        global_state.client.wait_at_barrier(f"meeting {next(_meetings)}", BARRIER_MINUTES * 60_000)
    except jax.errors.JaxRuntimeError as error:
        raise InputError(f"--distributed: the other processes did not come: {str(error).splitlines()[0]}") from error
    jax.block_until_ready(compiled(numbers))

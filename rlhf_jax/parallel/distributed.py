"""Connecting the processes of a run: one per host of a TPU slice, or several on one machine for tests.

    --distributed=auto                       TPU slices, SLURM, GKE: JAX finds the processes
    --distributed=HOST:PORT,PROCESSES,INDEX  explicit, as scripts/launch.py passes it

When a process dies, JAX's coordinator misses its heartbeat and every other process aborts. The default timeout is 100 s; here
it is `HEARTBEAT_SECONDS`. An abort prints a stack trace, so the script that started the process (scripts/launch.py on one
machine, scripts/tpu_vm.sh on a slice) explains it.
"""

from __future__ import annotations

import jax
from jax.experimental import multihost_utils

from rlhf_jax.errors import InputError

HEARTBEAT_SECONDS = 20


def connect(how: str) -> None:
    """Connect this process with the others; call it before anything else of JAX.

    how: the value of --distributed. Raises InputError for an unknown spelling, or when the other processes do not
    connect.
    """
    if how == "auto":
        _initialize()
        return
    parts = how.split(",")
    if len(parts) != 3 or ":" not in parts[0] or not (parts[1].isdigit() and parts[2].isdigit()):
        raise InputError(f"--distributed={how}: give auto or HOST:PORT,PROCESSES,INDEX")
    count, index = int(parts[1]), int(parts[2])
    if not 0 <= index < count:
        raise InputError(f"--distributed={how}: INDEX must be 0 ... {count - 1}")
    _initialize(coordinator_address=parts[0], num_processes=count, process_id=index)


def broadcast_from_first(step: int) -> int:
    """Return the first process's number on every process.

    Only the first process names checkpoints and sets damaged ones aside, so its number is the valid one.
    """
    return step if jax.process_count() == 1 else int(multihost_utils.broadcast_one_to_all(step))


def _initialize(
    coordinator_address: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    try:
        jax.distributed.initialize(
            coordinator_address, num_processes, process_id, heartbeat_timeout_seconds=HEARTBEAT_SECONDS
        )
    except (RuntimeError, ValueError) as error:
        raise InputError(f"--distributed: {str(error).splitlines()[0]}") from error

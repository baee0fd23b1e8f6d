"""Adds numbers of two processes, the second late: python late.py HOST:PORT,2,INDEX before|behind. A program of a test."""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
import numpy as np

from rlhf_jax.parallel import MeshConfig, make_mesh, replicated, to_global
from rlhf_jax.parallel.distributed import broadcast_from_first, connect

SECONDS = 34.0
"""More than the 30 s that Gloo waits for the first collective of a set of devices."""


if __name__ == "__main__":
    connect(sys.argv[1])
    late = SECONDS if jax.process_index() else 0.0
    if sys.argv[2] == "before":
        time.sleep(late)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2))
    if sys.argv[2] == "behind":
        time.sleep(late)  # compiling
    add = jax.jit(lambda x: x.sum(0), out_shardings=replicated(mesh))
    print(np.asarray(add(to_global(np.arange(8).reshape(4, 2), mesh))), broadcast_from_first(7), flush=True)

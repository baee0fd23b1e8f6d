"""Adds numbers of all processes for ever: python endless.py HOST:PORT,PROCESSES,INDEX. A program of a test."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from jax.experimental import multihost_utils

from rlhf_jax.parallel.distributed import connect


def add() -> int:
    return int(multihost_utils.process_allgather(np.int32(1)).sum())


if __name__ == "__main__":
    connect(sys.argv[1])
    assert add() == 2
    print("going", flush=True)
    while add():
        pass

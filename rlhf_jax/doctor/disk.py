"""Checks of where checkpoints will go."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.checkpoint_files.manifest import read_arrays, verify
from rlhf_jax.doctor.findings import Finding, judge
from rlhf_jax.loop import LoopConfig
from rlhf_jax.rundir.checkpoints import Checkpoints, Retention
from rlhf_jax.storage.names import CHECKPOINTS


def disk_checks(state: Any, run_dir: Path, loop: LoopConfig) -> Iterator[Finding]:
    """Write one checkpoint beside the run directory, read it again, remove it."""
    parent = next(path for path in run_dir.parents if path.is_dir())
    with tempfile.TemporaryDirectory(prefix=".doctor-", dir=parent) as scratch:
        began = time.monotonic()
        with Checkpoints(scratch, Retention(1)) as checkpoints:
            checkpoints.save(1, state, {})
        seconds, place = time.monotonic() - began, Path(scratch, CHECKPOINTS, "1")
        size = sum(entry["bytes"] for entry in verify(place)["files"].values())
        stored = read_arrays(place)
    expected = sum(leaf.nbytes for leaf in jax.tree.leaves(jax.device_get(jax.tree.map(_plain, state))))
    same = sum(array.nbytes for array in stored.values()) == expected
    yield judge(
        "checkpoint", same, f"{size / 1e6:.1f} MB written, verified and read in {seconds:.1f} s", "not what was saved"
    )
    needed, free = size * (loop.keep + loop.keep_best + 2), shutil.disk_usage(parent).free
    words = f"{free / 1e9:.1f} GB free, {needed / 1e9:.2f} GB for {loop.keep} + {loop.keep_best} steps and one more"
    yield judge("disk", needed < free, words, "lower LoopConfig.keep or take another run_dir")


def _plain(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf

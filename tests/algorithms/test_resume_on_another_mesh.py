"""A run that goes on with another number of devices: the same training up to rounding, within the bound that
docs/reliability.md states (relative loss difference <= 1e-5)."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import learn
from rlhf_jax.algorithms import SFT
from rlhf_jax.data.batch_config import BatchConfig
from rlhf_jax.models import Model
from rlhf_jax.parallel import MeshConfig, init_sharded, make_mesh, to_global, tree_shardings
from rlhf_jax.rundir.checkpoints import Checkpoints, Retention
from rlhf_jax.testing import IN_MEMORY, loaded_model, setting_of, tiny_config, token_batch

MODEL = Model(tiny_config())
BOUND = 1e-5
MESHES = {4: MeshConfig(data=2, fsdp=2), 2: MeshConfig(data=1, tensor=2), 1: MeshConfig()}


def batch(step: int) -> Any:
    rng = np.random.default_rng(step)
    return token_batch(rng.integers(3, MODEL.config.vocab_size, (8, 12)).tolist(), length=12)


@functools.cache
def job_on(devices: int) -> Any:
    """A job on so many devices, whose compiled programs several runs share."""
    mesh = make_mesh(MESHES[devices], jax.devices()[:devices])
    shardings = tree_shardings(MODEL.abstract(), MODEL.logical_axes(), mesh)
    key = jax.random.key(0, impl="threefry2x32")
    params = init_sharded(MODEL.init, shardings, mesh, key)
    optimizer = learn.OptimizerConfig(learning_rate=1e-2, schedule="cosine")
    algorithm = SFT(model=IN_MEMORY, batch=BatchConfig(8, 12, microbatches=2), optimizer=optimizer)
    return algorithm.wire(setting_of(mesh, steps=9), loaded_model(MODEL, params), None)


def train(run_dir: Path, devices: int, begin: int, end: int) -> list[float]:
    """Steps begin + 1 ... end on so many devices, from the checkpoint of ``begin``; saves ``end``. The losses."""
    job = job_on(devices)
    state = jax.tree.map(jnp.copy, job.state)  # a step gives its state away
    losses = []
    with Checkpoints(run_dir, Retention(9)) as checkpoints:
        if begin:
            state, _ = checkpoints.restore(state, begin)
        for step in range(begin + 1, end + 1):
            state, metrics = job.train_step(state, {}, to_global(batch(step), job.mesh))
            losses.append(float(metrics["loss"].value()))
        checkpoints.save(end, state, {})
    return losses


def test_four_devices_then_two_then_one(tmp_path: Path) -> None:
    unbroken = train(tmp_path / "unbroken", 4, 0, 9)
    moved = train(tmp_path / "moved", 4, 0, 3) + train(tmp_path / "moved", 2, 3, 6) + train(tmp_path / "moved", 1, 6, 9)
    assert moved[:3] == unbroken[:3]  # the same mesh: the same bits
    gaps = np.abs(np.array(moved) - unbroken) / np.abs(unbroken)
    assert gaps.max() <= BOUND, gaps
    assert unbroken[-1] != unbroken[0]  # it trained


def test_the_same_devices_again_are_the_same_bits(tmp_path: Path) -> None:
    unbroken = train(tmp_path / "unbroken", 4, 0, 6)
    assert train(tmp_path / "broken", 4, 0, 3) + train(tmp_path / "broken", 4, 3, 6) == unbroken

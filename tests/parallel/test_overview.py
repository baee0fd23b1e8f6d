"""The table of parameters."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rlhf_jax.parallel import batch_sharding, replicated
from rlhf_jax.parallel.overview import parameter_summary, parameter_table
from rlhf_jax.testing import mesh_of


def test_counts_bytes_and_shards_by_hand() -> None:
    """8 x 4 float32 over 8 devices: 32 numbers, 128 bytes, 16 on a device; 3 bfloat16 everywhere: 6 bytes on each."""
    mesh = mesh_of(fsdp=8)
    kernel = jax.device_put(jnp.zeros((8, 4)), batch_sharding(mesh))
    scale = jax.device_put(jnp.zeros(3, jnp.bfloat16), replicated(mesh))
    trees = {"trained": {"layer": {"kernel": kernel}, "scale": scale}}
    header, first, second, total = parameter_table(trees).splitlines()
    assert header.split()[:3] == ["parameter", "shape", "dtype"]
    assert first.split()[:8] == ["trained/layer/kernel", "8", "x", "4", "float32", "32", "128", "16"]
    assert "fsdp" in first and second.split() == ["trained/scale", "3", "bfloat16", "3", "6", "6", "-"]
    assert total.split() == ["trained:", "all", "35", "134", "22"]
    assert parameter_summary(trees) == "trained 35 parameters, 0.0 MiB a device"

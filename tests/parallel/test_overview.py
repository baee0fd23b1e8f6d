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
    assert parameter_summary(trees) == "trained 35 parameters, 0.0 MiB, 0.0 MiB a device"


def test_the_summary_gives_the_share_that_is_trained() -> None:
    """2^18 float32 numbers are 1 MiB, over 8 devices 0.125; 3 x 2^18 on every device are 3 MiB on each."""
    mesh = mesh_of(fsdp=8)
    adapters = jax.device_put(jnp.zeros((8, 2**15)), batch_sharding(mesh))
    base = jax.device_put(jnp.zeros((3, 2**18)), replicated(mesh))
    assert parameter_summary({"trained": adapters, "frozen": base}) == (
        "trained 262,144 parameters (25.0%), 1.0 MiB, 0.1 MiB a device; "
        "frozen 786,432 parameters (75.0%), 3.0 MiB, 3.0 MiB a device"
    )

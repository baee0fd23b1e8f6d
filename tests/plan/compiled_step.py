"""Compiles the training step of scripts/weak_scaling.py for a slice, its parameters over eight chips, in a process of its own,
because of what the compiler writes to its log: SLICE OUT.json. Without arguments: a program that the partitioner complains
of."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from weak_scaling import training_step

from rlhf_jax import plan
from rlhf_jax.parallel import MeshConfig, make_mesh, remake_mesh
from rlhf_jax.plan.memory import leaf_bytes, tree_bytes


def step(name: str, out: Path) -> None:
    _, mesh, phase = training_step(name, fsdp=8)
    compiled = phase.function.lower(*phase.arguments).compile()
    message = compiled.memory_analysis()
    sizes = {key: getattr(message, f"{key}_size_in_bytes") for key in ("argument", "output", "alias", "temp")}
    state, _, batch = phase.arguments
    predicted = {"state": tree_bytes(state), "batch": sum(leaf_bytes(leaf) for leaf in jax.tree.leaves(batch))}
    leaves = len(jax.tree.leaves(state))
    actual = {"sizes": sizes, "predicted": predicted, "leaves": leaves, "mesh": dict(mesh.shape)}
    out.write_text(json.dumps(actual | {"text": compiled.as_text()}))


def complaint() -> None:
    """Rows over eight chips, then columns over pairs of them: GSPMD finds no way, see `parallel.mesh_between`."""
    local = make_mesh(MeshConfig(fsdp=8), plan.parse_slice("v5e:2x4").devices())
    place = remake_mesh(MeshConfig(data=4, fsdp=1, tensor=2), local)

    def move(x: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(place, PartitionSpec(None, None, "tensor")))

    struct = jax.ShapeDtypeStruct((4, 64, 64), jnp.float32, sharding=NamedSharding(local, PartitionSpec(None, "fsdp")))
    jax.jit(move).lower(struct).compile()


if __name__ == "__main__":
    if sys.argv[1:]:
        step(sys.argv[1], Path(sys.argv[2]))
    else:
        complaint()

"""Meshes, the table of rules from logical to mesh axes, and placing arrays by it."""

from rlhf_jax.parallel.jitted import Jitted, jitted, shardings_of
from rlhf_jax.parallel.mesh import AXES, MeshConfig, make_mesh, mesh_between, remake_mesh
from rlhf_jax.parallel.placement import (
    abstract_arrays,
    init_abstract,
    init_sharded,
    state_shardings,
    to_global,
    to_host,
)
from rlhf_jax.parallel.rules import (
    RULES,
    ActivationConstraint,
    batch_sharding,
    partition_spec,
    replicated,
    tree_shardings,
)

__all__ = [
    "AXES",
    "RULES",
    "ActivationConstraint",
    "Jitted",
    "MeshConfig",
    "abstract_arrays",
    "batch_sharding",
    "init_abstract",
    "init_sharded",
    "jitted",
    "make_mesh",
    "mesh_between",
    "partition_spec",
    "remake_mesh",
    "replicated",
    "shardings_of",
    "state_shardings",
    "to_global",
    "to_host",
    "tree_shardings",
]

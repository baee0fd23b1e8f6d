"""The table from logical axis names to mesh axes, and shardings made from it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from rlhf_jax.errors import InputError

Rules = Mapping[str, tuple[str, ...]]

RULES: dict[str, tuple[str, ...]] = {
    # weights
    "layers": (),
    "embed": ("fsdp",),
    "embed_table": (),  # not fsdp: the looked-up rows would arrive split over fsdp and be replicated by XLA
    "vocab": ("fsdp", "tensor"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "positions": (),
    "norm": (),
    "scalar": (),
    "lora_rank": (),
    # weights of a mixture of experts
    "experts": ("expert",),
    "expert_embed": ("fsdp",),
    "expert_mlp": ("tensor",),
    "expert_logits": (),
    # activations
    "act_batch": ("data", "fsdp", "expert"),
    "act_length": ("sequence",),
    "act_cache": (),  # columns of a key/value cache: decoding writes one at a time
    "act_embed": (),
    "act_vocab": ("tensor",),
    "act_kv_heads": ("tensor",),
    "act_head_dim": (),
}


def partition_spec(axes: tuple[str, ...], rules: Rules = RULES) -> PartitionSpec:
    """Return the mesh axes of an array with these logical axes. Raises InputError for a name that the table lacks."""
    for name in axes:
        if name not in rules:
            raise InputError(f"logical axis {name!r} is not in the rules table; known: {', '.join(sorted(rules))}")
    return PartitionSpec(*(rules[name] if rules[name] else None for name in axes))


def _shards(mesh: Mesh | AbstractMesh, entry: Any) -> int:
    """Return the number of devices over which a PartitionSpec entry (None, an axis, a tuple of axes) splits a dimension."""
    axes = (entry,) if isinstance(entry, str) else entry or ()
    return math.prod(mesh.shape[axis] for axis in axes)


def _check_divisible(
    mesh: Mesh | AbstractMesh, spec: PartitionSpec, shape: tuple[int, ...], name: str
) -> PartitionSpec:
    """Return ``spec``. Raises InputError when it does not divide ``shape``."""
    for size, entry in zip(shape, spec, strict=False):
        shards = _shards(mesh, entry)
        if size % shards:
            raise InputError(
                f"mesh {dict(mesh.shape)}: {name} has a dimension of {size}, not divisible "
                f"over {entry} ({shards}); choose another MeshConfig"
            )
    return spec


def tree_shardings(abstract: Any, logical_axes: Any, mesh: Mesh | AbstractMesh, rules: Rules = RULES) -> Any:
    """Return a NamedSharding per leaf.

    abstract: tree of shapes. logical_axes: the same tree with tuples of names. Raises InputError naming the parameter
    whose dimension does not divide.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(abstract)
    axes = jax.tree.leaves(logical_axes, is_leaf=lambda leaf: isinstance(leaf, tuple))
    shardings = [
        NamedSharding(
            mesh, _check_divisible(mesh, partition_spec(names, rules), leaf.shape, jax.tree_util.keystr(path))
        )
        for (path, leaf), names in zip(leaves, axes, strict=True)
    ]
    return jax.tree.unflatten(treedef, shardings)


def batch_sharding(mesh: Mesh, rules: Rules = RULES) -> NamedSharding:
    """Return the sharding of a batch: rows over the batch axes, other dimensions whole."""
    return NamedSharding(mesh, partition_spec(("act_batch",), rules))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that is the same on every device."""
    return NamedSharding(mesh, PartitionSpec())


@dataclasses.dataclass(frozen=True)
class ActivationConstraint:
    """The sharding of activations over the mesh, passed to a `Model`. Hashable."""

    mesh: Mesh

    def spec(self, axes: tuple[str, ...], shape: tuple[int, ...]) -> PartitionSpec:
        """Return the PartitionSpec of an activation of this shape; dimensions that do not divide are whole."""
        entries = zip(shape, partition_spec(axes), strict=True)
        return PartitionSpec(*(None if size % _shards(self.mesh, entry) else entry for size, entry in entries))

    def parts(self, axis: str) -> int:
        """Return the number of devices that split a dimension with this logical axis."""
        return _shards(self.mesh, partition_spec((axis,))[0])

    def __call__(self, x: Array, axes: tuple[str, ...]) -> Array:
        entries: list[Any] = []
        for size, entry in zip(x.shape, partition_spec(axes), strict=True):
            if size == 1:
                entries.append(None)
            elif size % _shards(self.mesh, entry):  # a row count below the number of devices: left to the compiler
                entries.append(PartitionSpec.UNCONSTRAINED)
            else:
                entries.append(entry)
        constrained: Array = jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, PartitionSpec(*entries)))
        return constrained

"""Shardings of a run: the effect of the rules on each strategy's mesh, and the sharding of every array."""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

from rlhf_jax.errors import InputError
from rlhf_jax.models import Model, ModelConfig
from rlhf_jax.parallel import AXES, RULES, abstract_arrays, tree_shardings
from rlhf_jax.parallel.rules import Rules
from rlhf_jax.plan.chips import GIB
from rlhf_jax.plan.memory import tree_bytes
from rlhf_jax.plan.phases import PlannedPhase
from rlhf_jax.plan.report import Table


def strategies(chips: int, config: ModelConfig) -> dict[str, AbstractMesh]:
    """Return a mesh of ``chips`` for each way to split a run, by name.

    tensor and expert: the largest number, at most 8, that divides the model's key/value heads and experts, and 2 where nothing
    divides (the table then shows the model's error). Two slices are twice ``chips``.
    """
    tensor, expert = (min(8, math.gcd(chips, size)) for size in (config.num_kv_heads, config.num_experts))
    sizes: dict[str, dict[str, int]] = {"data parallel": {"data": chips}, "fsdp": {"fsdp": chips}}
    if chips % 2 == 0:
        for axis, size in (("tensor", max(2, tensor)), ("sequence", 2), ("expert", max(2, expert))):
            sizes[f"fsdp + {axis}"] = {"fsdp": chips // size, axis: size}
    sizes["two slices (MeshConfig.dcn_data = 2: only gradients pass between them)"] = {"data": 2, "fsdp": chips}
    kinds = (AxisType.Auto,) * len(AXES)
    return {
        name: AbstractMesh(tuple(axis_sizes.get(a, 1) for a in AXES), AXES, kinds) for name, axis_sizes in sizes.items()
    }


def sharding_tables(
    phase: PlannedPhase, model: Model, meshes: Mapping[str, Mesh | AbstractMesh], rules: Rules = RULES
) -> list[Table]:
    """Return tables of the rules on each of ``meshes`` (by name) and of the sharding of every array of the run.

    A table of rules says how much of ``model`` a chip holds, or why the model refuses the mesh.
    """
    sections = [_rules_table(name, mesh, model, rules) for name, mesh in meshes.items()]
    rows = []
    for kind, tree in phase.resident.items():
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
            sharding = getattr(leaf, "sharding", None)
            shard = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
            spec = "whole" if sharding is None else str(sharding.spec)
            where = jax.tree_util.keystr(path, simple=True, separator="/")
            rows.append((kind, where, f"{leaf.dtype} {list(leaf.shape)}", str(list(shard)), spec))
    return [*sections, Table("What stays in HBM", ("kind", "array", "whole", "a chip", "spec"), rows)]


def _rules_table(name: str, mesh: Mesh | AbstractMesh, model: Model, rules: Rules) -> Table:
    """Return the table of rules; axes that the mesh does not split share the last row."""
    rows, whole = [], []
    for logical, axes in rules.items():
        split_axes = [axis for axis in axes if mesh.shape[axis] > 1]
        if split_axes:
            parts = math.prod(mesh.shape[axis] for axis in split_axes)
            rows.append((logical, " x ".join(f"{axis} {mesh.shape[axis]}" for axis in split_axes), str(parts)))
        else:
            whole.append(logical)
    rows.append((", ".join(whole), "whole", "1"))
    sizes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "one chip"
    return Table(
        f"Rules, {name}: {sizes}; {_model_bytes(model, mesh, rules)}", ("logical axis", "mesh axes", "parts"), rows
    )


def _model_bytes(model: Model, mesh: Mesh | AbstractMesh, rules: Rules) -> str:
    abstract = model.abstract()
    try:
        arrays = abstract_arrays(abstract, tree_shardings(abstract, model.logical_axes(), mesh, rules))
    except InputError as error:
        return f"refused: {error}"
    return f"{tree_bytes(arrays) / GIB:.2f} GiB of the model's parameters a chip"

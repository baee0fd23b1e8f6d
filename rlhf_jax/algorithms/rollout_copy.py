"""A copy of the policy for sampling, on the run's devices in another mesh shape."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rlhf_jax.models import Model
from rlhf_jax.parallel import ActivationConstraint, mesh_between, tree_shardings
from rlhf_jax.types import Params


def rollout_copy(model: Model, params: Params, mesh: Mesh) -> tuple[Model, Params]:
    """Return the model and its parameters on ``mesh``, matrices in the dtype of their products. Call it under jit.

    Parameters that training splits over fsdp would be gathered for every token; here they are gathered once a rollout.
    The dtype is the one that every product casts to anyway, so tokens and log-probabilities stay the same.
    """
    training_mesh = model.constrain.mesh if isinstance(model.constrain, ActivationConstraint) else mesh
    stops = [stop for stop in (mesh_between(training_mesh, mesh), mesh) if stop is not None]
    model = dataclasses.replace(model, constrain=ActivationConstraint(mesh))
    shardings = [tree_shardings(model.abstract(), model.logical_axes(), stop) for stop in stops]

    def copy(path: Any, leaf: jax.Array, *way: Any) -> jax.Array:
        names = [key.key for key in path]
        if names[-1] in ("kernel", "embedding") and "scalar_head" not in names and leaf.dtype != jnp.int8:
            leaf = leaf.astype(model.config.dtype)
        for sharding in way:
            leaf = jax.lax.with_sharding_constraint(leaf, sharding)
        return leaf

    return model, jax.tree_util.tree_map_with_path(copy, params, *shardings)

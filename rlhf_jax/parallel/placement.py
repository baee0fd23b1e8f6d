"""Arrays created on their shards: parameters, optimizer state, batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from rlhf_jax.errors import InputError
from rlhf_jax.parallel.rules import ActivationConstraint, batch_sharding, replicated
from rlhf_jax.types import Params

_T = TypeVar("_T")


def state_shardings(abstract_state: Any, param_shardings: Params, mesh: Mesh) -> Any:
    """Return the shardings of any tree that contains trees like the parameters.

    A leaf whose path ends in a parameter's path (Adam's moments, the parameters themselves) gets the sharding of that
    parameter; every other leaf (counts, keys) is replicated.
    """
    by_path = {
        tuple(str(key) for key in path): sharding
        for path, sharding in jax.tree_util.tree_flatten_with_path(param_shardings)[0]
    }

    def place(path: tuple[Any, ...], leaf: Any) -> Any:
        keys = tuple(str(key) for key in path)
        for start in range(len(keys)):
            sharding = by_path.get(keys[start:])
            if sharding is not None and len(sharding.spec) <= len(leaf.shape):
                return sharding
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(place, abstract_state)


def init_sharded(make: Callable[..., _T], param_shardings: Params, mesh: Mesh, *arguments: Any) -> _T:
    """Return ``make(*arguments)``, run under jit with every output created on its shards: no device ever holds the whole."""
    shardings = state_shardings(jax.eval_shape(make, *arguments), param_shardings, mesh)
    result: _T = jax.jit(make, out_shardings=shardings)(*arguments)
    return result


def init_abstract(make: Callable[..., _T], param_shardings: Params, mesh: Mesh, *arguments: Any) -> _T:
    """Return the result of `init_sharded` as ShapeDtypeStructs with shardings, for planning."""
    shapes = jax.eval_shape(make, *arguments)
    abstract: _T = abstract_arrays(shapes, state_shardings(shapes, param_shardings, mesh))
    return abstract


def abstract_arrays(shapes: Any, shardings: Any) -> Any:
    """Return a tree of ShapeDtypeStructs with shardings from a tree of shapes and a tree of shardings."""
    struct: Any = jax.ShapeDtypeStruct
    return jax.tree.map(lambda leaf, sharding: struct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings)


def to_host(tree: _T) -> _T:
    """Return the whole of ``tree`` as numpy arrays in every process; rows on other processes are gathered."""
    if jax.process_count() == 1:
        host: _T = jax.device_get(tree)
    else:
        host = multihost_utils.process_allgather(tree, tiled=True)
    return host


def to_global(batch: _T, mesh: Mesh) -> _T:
    """Return a host batch (numpy, the whole of it in every process) as global arrays with rows over the batch axes.

    Raises InputError when the rows do not divide over the mesh's batch axes.
    """
    sharding = batch_sharding(mesh)
    shards = ActivationConstraint(mesh).parts("act_batch")

    def place(x: Any) -> Any:
        if x.shape[0] % shards:
            raise InputError(
                f"batch of {x.shape[0]} rows does not divide over {shards} devices: change batch_size or MeshConfig"
            )
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    arrays: _T = jax.tree.map(place, batch)
    return arrays

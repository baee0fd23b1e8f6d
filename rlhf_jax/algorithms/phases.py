"""The phases of a run: jitted functions with their arguments and their work, whose cost `plan` computes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rlhf_jax.batches import PromptBatch, TokenBatch
from rlhf_jax.parallel import abstract_arrays, batch_sharding
from rlhf_jax.types import Rng


@dataclasses.dataclass(frozen=True)
class Work:
    """The work of one model in one call of a phase.

    role: of the model. kind: "forward", "train" (forward and backward) or "decode" (sampling). rows: number of sequences. columns:
    sequence length; for decode the prompt length. read: columns at which the head is evaluated; for decode the largest response
    length. parts: microbatches, one after another. summed: whether gradients of several parts are added. slots: of the sampler, 0 =
    one for each row. mesh: None = the mesh of the run.
    """

    role: str
    kind: Literal["forward", "train", "decode"]
    rows: int
    columns: int
    read: int
    parts: int = 1
    summed: bool = False
    slots: int = 0
    mesh: Mesh | None = None


@dataclasses.dataclass(frozen=True)
class Phase:
    """One jitted function of a run, with shapes for its arguments.

    resident: everything in device memory during the phase, by kind, whether the phase reads it or not. tokens: read or written by
    one pass, padding included. passes: how often a call does its work (epochs). looped: the state is carried through a loop inside
    the
    program.
    """

    name: str
    function: Any
    arguments: tuple[Any, ...]
    resident: Mapping[str, Any]
    tokens: int
    work: tuple[Work, ...] = ()
    passes: int = 1
    looped: bool = False


def row_shape(mesh: Mesh, dtype: Any, *shape: int) -> Any:
    """Return the shape of an array whose first axis is rows of a batch, on the devices of ``mesh``."""
    struct: Any = jax.ShapeDtypeStruct
    return struct(shape, dtype, sharding=batch_sharding(mesh))


def token_batch_shape(mesh: Mesh, *rows: int, length: int) -> TokenBatch:
    """Return the shapes of a `TokenBatch` [*rows, length]."""
    ids, flags = row_shape(mesh, jnp.int32, *rows, length), row_shape(mesh, jnp.bool_, *rows, length)
    return TokenBatch(ids, ids, ids, flags)


def prompt_batch_shape(mesh: Mesh, rows: int, length: int) -> PromptBatch:
    """Return the shapes of a batch of `data.prompt_batches`."""
    numbers = row_shape(mesh, jnp.int32, rows)
    flags = row_shape(mesh, jnp.bool_, rows, length)
    return PromptBatch(row_shape(mesh, jnp.int32, rows, length), flags, numbers, numbers)


def rng_shape() -> Rng:
    """Return the shape of a key."""
    shape: Rng = jax.eval_shape(lambda: jax.random.key(0, impl="threefry2x32"))
    return shape


def shapes_of_rows(mesh: Mesh, function: Any, *arguments: Any) -> Any:
    """Return the shapes of the outputs of ``function``, each of which has the rows of the batch first."""
    shapes = jax.eval_shape(function, *arguments)
    return abstract_arrays(shapes, jax.tree.map(lambda _: batch_sharding(mesh), shapes))

"""Bytes of HBM a chip that a phase needs, from the architecture: what is known without compiling.

What lies there at the same time was read in programs that libtpu 0.0.42 made (docs/tpu.md): of several models one goes
backward after another; the weights of blocks are cast to the dtype of products where they lie, before they are gathered.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.models import Model, ModelConfig
from rlhf_jax.models.attention import choose_implementation
from rlhf_jax.plan.analytic import kept_columns, split_weights

Axes = Mapping[str, int]
"""Sizes of a mesh by axis."""
SUBLANES, LANES = 8, 128
"""Rows and columns of a tile in a TPU's memory."""
SCATTERED = 64
"""The largest ring in which libtpu 0.0.42 was seen to reduce and scatter gradients in one; in 256 chips it reduces all of them to
every chip."""


def cache_bytes(config: ModelConfig, rows: int, columns: int) -> int:
    """Return the bytes of keys and values of every layer in the dtype of activations."""
    entries = 2 * kept_columns(config, columns) * rows * config.num_kv_heads * config.head_dim
    return entries * config.dtype.itemsize


def saved_bytes(config: ModelConfig, rows: int, length: int) -> int | None:
    """Return the bytes of activations that wait for the backward pass.

    They are the input of each block and, with remat "cheap", its products with weights but the last one, which is only added.
    None where that is the compiler's choice: without recomputation, and "cheap" with experts, whose products are grouped.
    """
    if not config.remat or (config.remat == "cheap" and config.num_experts):
        return None
    width = config.hidden_size
    if config.remat == "cheap":
        heads = config.num_heads + 2 * config.num_kv_heads
        width += heads * config.head_dim + config.hidden_size + (1 + config.gated_mlp) * config.ffn_size
    columns = config.num_layers * width + config.hidden_size
    return columns * rows * length * config.dtype.itemsize


def block_bytes(model: Model, rows: int, length: int, mesh: Axes, *, backward: bool) -> int:
    """Return the bytes that one block needs while it runs, with ``rows`` sequences a chip.

    They are its activations and, when parameters are split over chips, the weights of two blocks (the one that runs and the
    next, which is being gathered).
    """
    config, width, tensor = model.config, model.config.dtype.itemsize, mesh["tensor"]
    weights = 2 * width * split_weights(model)[1] // config.num_layers // tensor
    columns = (5 if backward else 2) * config.ffn_size // tensor + (10 if backward else 4) * config.hidden_size
    activations = rows * length * columns * width
    if choose_implementation(config, model.constrain) != "splash":
        activations += rows * config.num_heads * length * length * 4 * (3 if backward else 2) // tensor
    return weights + activations


def head_bytes(model: Model, rows: int, heads_at: int, mesh: Axes, *, backward: bool) -> int:
    """Return the bytes of a chunk of logits, of the head's whole float32 gradient (backward, none under adapters), and of the head.

    The head counts twice, gathered and copied into place, except where its rows come in whole tiles round a ring of all
    chips: there it is multiplied while it is sent.
    """
    config, tensor = model.config, mesh["tensor"]
    if not config.has_lm:
        return 0
    head, size = config.vocab_size * config.hidden_size, 4 if backward and model.lora is None else 0
    if mesh["fsdp"] > 1 and (mesh["data"] > 1 or config.vocab_size // (mesh["fsdp"] * tensor) % SUBLANES):
        size += 2 * config.dtype.itemsize
    return (head * size + 4 * rows * min(config.logits_chunk, heads_at) * config.vocab_size) // tensor


def table_bytes(model: Model, rows: int, length: int, mesh: Axes, *, backward: bool) -> int:
    """Return the bytes of looking rows of the table up (`models.lookup`).

    Forward: rows of all tokens along fsdp, made and added up, or the whole table. Backward: its float32 gradient, and the sum
    of all chips where the compiler does not scatter it.
    """
    config = model.config
    if mesh["fsdp"] * mesh["tensor"] == 1 or (backward and model.lora is not None):
        return 0
    tokens = rows * length * mesh["fsdp"]
    if tokens <= config.vocab_size:
        return 2 * tokens * config.hidden_size * config.dtype.itemsize
    width = 4 * (2 if mesh["fsdp"] > SCATTERED else 1) if backward else config.dtype.itemsize
    return config.vocab_size * config.hidden_size * width


def scoring_bytes(models: Sequence[tuple[Model, int]], rows: int, length: int, mesh: Axes) -> int:
    """Return the bytes of scoring with models one after another.

    Each model comes with the number of columns of a row that its head reads; the next model's table is being gathered.
    """
    passing = [
        max(
            block_bytes(one, rows, length, mesh, backward=False),
            head_bytes(one, rows, read, mesh, backward=False)
            + (table_bytes(one, rows, length, mesh, backward=False) if len(models) > 1 else 0),
        )
        for one, read in models
    ]
    return max(passing)


@dataclasses.dataclass(frozen=True)
class Learning:
    """The temporaries of a training step when they are largest, in bytes.

    gradients: float32, sharded as parameters, and with several microbatches their sum.
    activations: those that wait for the backward pass, None where that is the compiler's choice.
    casts: split weights in the dtype of products.
    passing: gathered weights, one block, logits or head.
    """

    gradients: int
    activations: int | None
    casts: int
    passing: int

    @property
    def total(self) -> int:
        return self.gradients + (self.activations or 0) + self.casts + self.passing


def learning(
    models: Sequence[Model], params: Any, mesh: Axes, microbatches: int, rows: int, length: int, heads_at: int
) -> Learning:
    """Return the temporaries of a step on ``rows`` sequences a chip at a time.

    params: of all ``models``, shapes with shardings.
    """
    leaves = jax.tree.leaves(params)
    gradient_bytes = sum(4 * leaf_bytes(leaf) // int(leaf.dtype.itemsize) for leaf in leaves) // len(models)
    width = models[0].config.dtype.itemsize
    casts = sum(width * leaf_bytes(leaf) // int(leaf.dtype.itemsize) for leaf in leaves if leaf.dtype.itemsize > width)
    saved = [saved_bytes(one.config, rows, length) for one in models]
    saved_sizes = [size or 0 for size in saved]
    summed = gradient_bytes * len(models) if microbatches > 1 else 0
    waiting, moments = 0, []
    for index, one in enumerate(models):
        block = block_bytes(one, rows, length, mesh, backward=True)
        head = head_bytes(one, rows, heads_at, mesh, backward=True)
        table = table_bytes(one, rows, length, mesh, backward=True)
        moments += [
            (waiting + gradient_bytes, saved_sizes[index], block),
            (waiting, sum(saved_sizes[index:]), head),
            (waiting + gradient_bytes, 0, table),
        ]
        waiting += 0 if summed else gradient_bytes
        waiting += table // 2 if mesh["fsdp"] > SCATTERED else 0  # sums of whole tables wait for the optimiser
    gradients, activations, passing = max(moments, key=sum)
    return Learning(summed + gradients, None if None in saved else activations, casts, passing)


def copied_bytes(tree: Any) -> int:
    """Return the bytes of a chip's arrays of a loop's state whose rows are shorter than a tile, as adapters of rank 64.

    The loop has a second copy of them with tiles filled up.
    """
    short = [leaf for leaf in jax.tree.leaves(tree) if len(leaf.shape) > 1 and leaf.shape[-1] < LANES < leaf.shape[-2]]
    return sum(leaf_bytes(leaf) // leaf.shape[-1] * LANES for leaf in short)


def tree_bytes(tree: Any) -> int:
    """Return the bytes a chip of a tree of arrays or ShapeDtypeStructs with shardings (the whole of a leaf that has none).

    An array that stands in several places counts once: under adapters the reference is the policy's base.
    """
    return sum(leaf_bytes(leaf) for leaf in {id(leaf): leaf for leaf in jax.tree.leaves(tree)}.values())


def leaf_bytes(leaf: Any) -> int:
    """Return the bytes a chip of one array."""
    sharding = getattr(leaf, "sharding", None)
    shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
    width = 8 if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else int(leaf.dtype.itemsize)  # a key is two uint32
    return int(math.prod(shape)) * width

"""Operations and bytes from the architecture alone: what the compiler's program is checked against.

Operations are those of matrix products (2 per multiplication and addition), without recomputation: "model FLOPs" in the
sense of Chowdhery et al. 2022 (PaLM, appendix B), except that attention counts what its implementation computes: the whole
square, or the blocks that it visits.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.models import Model, ModelConfig
from rlhf_jax.models.attention import blocks, chosen, in_blocks
from rlhf_jax.models.lora import TRAINED
from rlhf_jax.models.splash import BLOCKS, LANES
from rlhf_jax.plan.kernels import visited_pairs
from rlhf_jax.types import Params

Axes = Mapping[str, int]
"""Sizes of a mesh by axis."""


def block_weights(config: ModelConfig) -> int:
    """Weights of all blocks that a token is multiplied with: attention, and the feed-forward or its picked experts."""
    d, k = config.hidden_size, config.head_dim
    attention = 2 * d * config.num_heads * k + 2 * d * config.num_kv_heads * k
    matrices = 3 if config.gated_mlp else 2
    experts = config.num_layers - len(config.dense_layers) if config.num_experts else 0
    picked = config.experts_per_token * matrices * d * config.expert_ffn_size + d * config.num_experts
    dense = matrices * d * config.ffn_size
    return config.num_layers * attention + experts * picked + (config.num_layers - experts) * dense


def attention_flops(config: ModelConfig, queries: int, keys: int) -> int:
    """Scores and their weighted sum, all layers: 4 x queries x keys x heads x head_dim."""
    return 4 * config.num_layers * queries * keys * config.num_heads * config.head_dim


def head_flops(config: ModelConfig, positions: int) -> int:
    """Logits of ``positions`` tokens, and scalars."""
    logits = config.vocab_size if config.has_lm else 0
    return 2 * positions * config.hidden_size * (logits + (1 if config.has_scalar else 0))


def self_attention_flops(config: ModelConfig, length: int, implementation: str) -> int:
    """Of one row of ``length`` tokens, all layers, as ``implementation`` (of `attention_of`) computes it."""
    if implementation == "blocks":
        windows = (config.layer(layer).window for layer in range(config.num_layers))
        pairs = sum((end - first) * (end - low) for window in windows for first, end, low in blocks(length, window))
        return 4 * pairs * config.num_heads * config.head_dim
    if implementation != "splash":
        return attention_flops(config, length, length)
    filled = length + -length % LANES
    block = next(size for size in BLOCKS if filled % size == 0)
    pairs = sum(visited_pairs(filled, config.layer(i).window, block) for i in range(config.num_layers))
    return 4 * pairs * config.num_heads * config.head_dim


def forward_flops(config: ModelConfig, rows: int, length: int, heads_at: int, implementation: str = "xla") -> int:
    """One pass over ``rows`` sequences; heads_at: positions a row at which a head is read."""
    blocks = 2 * rows * length * block_weights(config)
    attention = rows * self_attention_flops(config, length, implementation)
    return blocks + attention + head_flops(config, rows * heads_at)


def attention_of(model: Model) -> str:
    """The implementation of `models.attention`; "blocks" where "xla" leaves pairs out."""
    implementation = chosen(model.config, model.constrain)
    whole = model.constrain.parts("act_length") > 1 or not in_blocks(model.constrain)  # a ring meets all pairs
    return implementation if implementation != "xla" or whole else "blocks"


def model_flops(model: Model, rows: int, length: int, heads_at: int) -> int:
    """`forward_flops` of a model on its devices, adapters included."""
    whole = forward_flops(model.config, rows, length, heads_at, attention_of(model))
    return whole + 2 * rows * length * adapter_weights(model)


def training_flops(model: Model, rows: int, length: int, heads_at: int) -> int:
    """Forward and backward: twice the forward pass again for gradients of activations and weights; frozen weights under
    adapters need the first of the two only."""
    forward = model_flops(model, rows, length, heads_at)
    if model.lora is None:
        return 3 * forward
    return 2 * forward + 2 * rows * length * adapter_weights(model)


def adapter_weights(model: Model) -> int:
    """Weights of a model's adapters, 0 without."""
    if model.lora is None:
        return 0
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(_adapters(model.abstract())))


def _adapters(tree: Params) -> Params:
    kept = {name: below for name, below in tree.items() if isinstance(below, dict) or name in TRAINED}
    return {name: _adapters(below) if isinstance(below, dict) else below for name, below in kept.items()}


def generate_flops(config: ModelConfig, rows: int, prompt: int, new: int, implementation: str = "xla") -> int:
    """Prefill and ``new`` decoding steps, each of which attends to the whole cache."""
    attention = 4 * kept_columns(config, prompt + new) * config.num_heads * config.head_dim
    step = 2 * rows * block_weights(config) + rows * attention + head_flops(config, rows)
    return forward_flops(config, rows, prompt, 0, implementation) + new * step


def cache_bytes(config: ModelConfig, rows: int, columns: int) -> int:
    """Keys and values of every layer in the dtype of activations."""
    entries = 2 * kept_columns(config, columns) * rows * config.num_kv_heads * config.head_dim
    return entries * config.dtype.itemsize


def kept_columns(config: ModelConfig, columns: int) -> int:
    """Of a cache for ``columns`` tokens, all layers: those that slide hold no more than their window."""
    return sum(min(columns, config.layer(index).window or columns) for index in range(config.num_layers))


def saved_bytes(config: ModelConfig, rows: int, length: int) -> int | None:
    """Activations that wait for the backward pass: the input of each block and, with remat "cheap", its products with
    weights but the last one, which is only added. None where that is the compiler's choice: without recomputation, and
    "cheap" with experts, whose products are grouped."""
    if not config.remat or (config.remat == "cheap" and config.num_experts):
        return None
    width = config.hidden_size
    if config.remat == "cheap":
        heads = config.num_heads + 2 * config.num_kv_heads
        width += heads * config.head_dim + config.hidden_size + (1 + config.gated_mlp) * config.ffn_size
    columns = config.num_layers * width + config.hidden_size
    return columns * rows * length * config.dtype.itemsize


def passing_bytes(model: Model, rows: int, length: int, heads_at: int, mesh: Axes, *, backward: bool) -> int:
    """What a pass over ``rows`` sequences a chip holds for a while, when parameters are split over chips: the weights of two
    blocks (of one that works and one on its way), a block's activations, and forward the gathered head and a chunk of
    logits. What comes at the ends of the backward pass instead: `end_bytes`."""
    config, width = model.config, model.config.dtype.itemsize
    blocks = 2 * width * _split_weights(model)[1] // config.num_layers
    columns = (5 if backward else 2) * config.ffn_size + (10 if backward else 4) * config.hidden_size
    activations = rows * length * columns * width
    if chosen(config, model.constrain) != "splash":
        activations += rows * config.num_heads * length * length * 4 * (3 if backward else 2)
    head = 0
    if config.has_lm and not backward:
        head = 4 * rows * min(config.logits_chunk, heads_at) * config.vocab_size
        if mesh["fsdp"] > 1:  # rows that come as no whole tiles are copied into place
            copied = config.vocab_size // (mesh["fsdp"] * mesh["tensor"]) % SUBLANES
            head += width * config.vocab_size * config.hidden_size * (2 if copied else 1)
    return (blocks + activations + head) // mesh["tensor"]


def end_bytes(models: Sequence[Model], mesh: Axes) -> int:
    """Whole float32 gradients of tables and heads that a training step of ``models`` holds at a time; under adapters one
    head in the dtype of products. One, when the compiler scatters each as it is made. It does not when there are copies
    (``data``), or in a ring of more than `SCATTERED` chips: then the gradient that a chip has made and the sum of all chips
    stand there for every model, in such a ring the head's as well."""
    mine = [one.config.vocab_size * one.config.hidden_size * 4 for one in models]
    if any(one.lora is not None for one in models):
        return (
            max(size * one.config.dtype.itemsize // 4 for size, one in zip(mine, models, strict=True)) // mesh["tensor"]
        )
    unscattered = mesh["fsdp"] > SCATTERED
    if not unscattered and mesh["data"] == 1:
        return max(mine) // mesh["tensor"]
    heads = [unscattered and one.config.has_lm for one in models]
    return sum(size * (2 + head) for size, head in zip(mine, heads, strict=True)) // mesh["tensor"]


SUBLANES = 8
"""Rows of a tile in a TPU's memory."""
SCATTERED = 64
"""The largest ring in which libtpu 0.0.42 was seen to reduce and scatter gradients in one; in 256 chips it reduces all of them to
every chip."""


def sent_bytes(model: Model, fsdp: int, data: int, heads_at: int, microbatches: int = 1) -> float:
    """Bytes that leave a chip in one training step with recomputed blocks, of rings over ``fsdp`` chips: all of a block's
    weights come in the dtype of products forward and again to be recomputed with and to go back through, and their gradients
    leave in it. The table comes once, the head too when all columns are one chunk (what came forward is kept), else twice a
    chunk; the float32 gradient of the head leaves once a chunk. Over ``data`` copies the gradients of what a chip holds are
    summed. The float32 gradient of the table leaves once; with copies the compiler sums all of it over all chips, which is
    twice as much. Neither rows nor columns of activations travel, so that more chips send no more each."""
    config, width = model.config, model.config.dtype.itemsize
    table, in_blocks = config.vocab_size * config.hidden_size, _split_weights(model)[1]
    chunks = math.ceil(heads_at / config.logits_chunk) if config.has_lm else 0
    gathered = width * (2 * in_blocks + table + table * (1 if chunks == 1 else 2 * chunks))
    scattered = width * in_blocks + 4 * table * chunks
    copied = 2 * (width * in_blocks + 4 * table * min(chunks, 1)) / fsdp
    whole = 4 * table * ((fsdp - 1) / fsdp if data == 1 else 2 * (fsdp * data - 1) / (fsdp * data))
    return microbatches * ((gathered + scattered) * (fsdp - 1) / fsdp + copied * (data - 1) / data + whole)


def _split_weights(model: Model) -> tuple[int, int]:
    """Weights of table and head, and of all blocks, adapters apart."""
    config = model.config
    tables = config.vocab_size * config.hidden_size * (1 + (config.has_lm and not config.tie_embeddings))
    everything = jax.tree.leaves(dataclasses.replace(model, lora=None).abstract())
    return tables, sum(math.prod(leaf.shape) for leaf in everything) - tables


def tree_bytes(tree: Any) -> int:
    """Bytes a chip of a tree of arrays or ShapeDtypeStructs with shardings (the whole of a leaf that has none). An array
    that stands in several places counts once: under adapters the reference is the policy's base."""
    return sum(leaf_bytes(leaf) for leaf in {id(leaf): leaf for leaf in jax.tree.leaves(tree)}.values())


def leaf_bytes(leaf: Any) -> int:
    """Of one array, a chip."""
    sharding = getattr(leaf, "sharding", None)
    shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
    width = 8 if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else int(leaf.dtype.itemsize)  # a key is two uint32
    return int(math.prod(shape)) * width

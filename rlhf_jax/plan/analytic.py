"""Operations and bytes from the architecture alone: what the compiler's program is checked against.

Operations are those of matrix products (2 per multiplication and addition), without recomputation: "model FLOPs" in the
sense of Chowdhery et al. 2022 (PaLM, appendix B), except that attention counts the whole square, as a dense softmax
computes it.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.models import ModelConfig


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


def forward_flops(config: ModelConfig, rows: int, length: int, heads_at: int) -> int:
    """One pass over ``rows`` sequences; heads_at: positions a row at which a head is read."""
    blocks = 2 * rows * length * block_weights(config)
    return blocks + rows * attention_flops(config, length, length) + head_flops(config, rows * heads_at)


def generate_flops(config: ModelConfig, rows: int, prompt: int, new: int) -> int:
    """Prefill and ``new`` decoding steps, each of which attends to the whole cache."""
    step = 2 * rows * block_weights(config) + rows * attention_flops(config, 1, prompt + new) + head_flops(config, rows)
    return forward_flops(config, rows, prompt, 0) + new * step


def cache_bytes(config: ModelConfig, rows: int, columns: int) -> int:
    """Keys and values of every layer in the dtype of activations."""
    entries = 2 * config.num_layers * rows * config.num_kv_heads * columns * config.head_dim
    return entries * config.dtype.itemsize


def saved_bytes(config: ModelConfig, rows: int, length: int) -> int | None:
    """Activations that wait for the backward pass when every block is recomputed: the input of each block. None without
    recomputation: what is kept is then the compiler's choice."""
    if not config.remat:
        return None
    return (config.num_layers + 1) * rows * length * config.hidden_size * config.dtype.itemsize


def tree_bytes(tree: Any) -> int:
    """Bytes a chip of a tree of arrays or ShapeDtypeStructs with shardings (the whole of a leaf that has none)."""
    return sum(leaf_bytes(leaf) for leaf in jax.tree.leaves(tree))


def leaf_bytes(leaf: Any) -> int:
    """Of one array, a chip."""
    sharding = getattr(leaf, "sharding", None)
    shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
    width = 8 if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else int(leaf.dtype.itemsize)  # a key is two uint32
    return int(math.prod(shape)) * width

"""Operations and bytes from the architecture alone: what the compiler's program is checked against.

Operations are those of matrix products (2 per multiplication and addition), without recomputation: "model FLOPs" in the
sense of Chowdhery et al. 2022 (PaLM, appendix B), except that attention counts what its implementation computes: the whole
square, or the blocks that it visits.
"""

from __future__ import annotations

import dataclasses
import math

import jax

from rlhf_jax.models import Model, ModelConfig
from rlhf_jax.models.attention import blocks, choose_implementation, in_blocks
from rlhf_jax.models.lora import TRAINED
from rlhf_jax.models.splash import BLOCKS, LANES
from rlhf_jax.plan.kernels import visited_pairs
from rlhf_jax.types import Params


def block_weights(config: ModelConfig) -> int:
    """Return the weights of all blocks that a token is multiplied with: attention, and the feed-forward or its picked experts."""
    d, k = config.hidden_size, config.head_dim
    attention = 2 * d * config.num_heads * k + 2 * d * config.num_kv_heads * k
    matrices = 3 if config.gated_mlp else 2
    experts = config.num_layers - len(config.dense_layers) if config.num_experts else 0
    picked = config.experts_per_token * matrices * d * config.expert_ffn_size + d * config.num_experts
    dense = matrices * d * config.ffn_size
    return config.num_layers * attention + experts * picked + (config.num_layers - experts) * dense


def attention_flops(config: ModelConfig, queries: int, keys: int) -> int:
    """Return the operations of scores and their weighted sum, all layers: 4 x queries x keys x heads x head_dim."""
    return 4 * config.num_layers * queries * keys * config.num_heads * config.head_dim


def head_flops(config: ModelConfig, positions: int) -> int:
    """Return the operations of the logits of ``positions`` tokens, and of scalar heads."""
    logits = config.vocab_size if config.has_lm else 0
    return 2 * positions * config.hidden_size * (logits + (1 if config.has_scalar else 0))


def self_attention_flops(config: ModelConfig, length: int, implementation: str) -> int:
    """Return the operations of one row of ``length`` tokens, all layers, as ``implementation`` (of `attention_of`) computes it."""
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
    """Return the operations of one pass over ``rows`` sequences.

    heads_at: positions a row at which a head is read.
    """
    blocks = 2 * rows * length * block_weights(config)
    attention = rows * self_attention_flops(config, length, implementation)
    return blocks + attention + head_flops(config, rows * heads_at)


def attention_of(model: Model) -> str:
    """Return the implementation of `models.attention`; "blocks" where "xla" leaves pairs out."""
    implementation = choose_implementation(model.config, model.constrain)
    whole = model.constrain.parts("act_length") > 1 or not in_blocks(model.constrain)  # a ring meets all pairs
    return implementation if implementation != "xla" or whole else "blocks"


def model_flops(model: Model, rows: int, length: int, heads_at: int) -> int:
    """Return `forward_flops` of a model on its devices, adapters included."""
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
    """Return the number of weights of a model's adapters, 0 without adapters."""
    if model.lora is None:
        return 0
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(_adapters(model.abstract())))


def _adapters(tree: Params) -> Params:
    adapters = {name: below for name, below in tree.items() if isinstance(below, dict) or name in TRAINED}
    return {name: _adapters(below) if isinstance(below, dict) else below for name, below in adapters.items()}


def generate_flops(config: ModelConfig, rows: int, prompt: int, new: int, implementation: str = "xla") -> int:
    """Prefill and ``new`` decoding steps, each of which attends to the whole cache."""
    attention = 4 * kept_columns(config, prompt + new) * config.num_heads * config.head_dim
    step = 2 * rows * block_weights(config) + rows * attention + head_flops(config, rows)
    return forward_flops(config, rows, prompt, 0, implementation) + new * step


def kept_columns(config: ModelConfig, columns: int) -> int:
    """Return the columns of a cache for ``columns`` tokens, all layers: sliding-window layers hold no more than their window."""
    return sum(min(columns, config.layer(index).window or columns) for index in range(config.num_layers))


def sent_bytes(model: Model, fsdp: int, data: int, heads_at: int, microbatches: int = 1) -> float:
    """Return the bytes that leave a chip in one training step with recomputed blocks, by rings over ``fsdp`` chips.

    Blocks: all weights arrive in the dtype of products for the forward pass and again for recomputation and the backward pass;
    their gradients leave in the same dtype.
    Table: it arrives once, and its float32 gradient leaves once. With copies the compiler sums all of that gradient over all
    chips, which is twice as much.
    Head: it arrives once when all columns are one chunk (the forward pass's copy is reused), else twice a chunk; its float32
    gradient leaves once a chunk.
    Copies: over ``data`` copies the gradients of a chip's shard are summed.
    Neither rows nor columns of activations are sent, so the bytes a chip sends do not grow with the number of chips.
    """
    config, width = model.config, model.config.dtype.itemsize
    table, in_blocks = config.vocab_size * config.hidden_size, split_weights(model)[1]
    chunks = math.ceil(heads_at / config.logits_chunk) if config.has_lm else 0
    gathered = width * (2 * in_blocks + table + table * (1 if chunks == 1 else 2 * chunks))
    scattered = width * in_blocks + 4 * table * chunks
    copied = 2 * (width * in_blocks + 4 * table * min(chunks, 1) + 4 * table) / fsdp
    gathered_and_scattered = gathered + scattered + 4 * table
    return microbatches * (gathered_and_scattered * (fsdp - 1) / fsdp + copied * (data - 1) / data)


def split_weights(model: Model) -> tuple[int, int]:
    """Return the number of weights of table and head, and of all blocks, without adapters."""
    config = model.config
    tables = config.vocab_size * config.hidden_size * (1 + (config.has_lm and not config.tie_embeddings))
    leaves = jax.tree.leaves(dataclasses.replace(model, lora=None).abstract())
    return tables, sum(math.prod(leaf.shape) for leaf in leaves) - tables

"""Splash attention on TPU (jax.experimental.pallas.ops.tpu.splash_attention) as a shard_map island.

GSPMD cannot partition a Pallas kernel, so the island runs it on each device's own rows and heads.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int32

LANES = 128
"""The kernel works on blocks of a multiple of this many columns."""
BLOCKS = (512, 256, 128)
"""Block lengths; the largest that divides the columns is used."""
RESIDUALS = "splash_residuals"
"""Name in `jax.checkpoint` policies of the kernel's result and its logsumexp, which its backward pass reads."""


def splash_attention(
    query: Float[Array, "B S G R K"],
    key: Float[Array, "B G S K"],
    value: Float[Array, "B G S K"],
    segment_ids: Int32[Array, "B S"],
    *,
    window: int | None,
    scale: float,
    cap: float | None,
    mesh: Mesh | None = None,
    key_spec: PartitionSpec | None = None,
    interpret: bool = False,
) -> Float[Array, "B S G R K"]:
    """Compute causal attention inside segments, like `attention.attend` under `attention.segment_mask`.

    The results of padding columns (segment 0) may differ: padding attends to padding.
    window, scale, cap: of the layer. mesh, key_spec: PartitionSpec of keys [B, G, S, K] over a mesh (rows and heads may
    be split); None: one device. interpret: run the kernel's body as ordinary JAX, on any platform. Columns are padded
    to a multiple of `LANES`.
    """
    length = query.shape[1]
    fill = -length % LANES
    rows = query.transpose(0, 2, 3, 1, 4) * scale  # [B, G, R, S, K]
    rows, key, value = (jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, fill), (0, 0)]) for x in (rows, key, value))
    segment_ids = jnp.pad(segment_ids, ((0, 0), (0, fill)))
    local = functools.partial(_attend_locally, window=window, cap=cap, interpret=interpret)
    if mesh is not None and key_spec is not None:
        batch, heads, columns, size = key_spec
        rows_spec = PartitionSpec(batch, heads, None, columns, size)
        local = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(rows_spec, key_spec, key_spec, PartitionSpec(batch, columns)),
            out_specs=rows_spec,
            check_vma=False,  # a Pallas call does not declare how its result varies over the mesh
        )
    mixed = local(rows, key, value, segment_ids)
    return mixed[:, :, :, :length].transpose(0, 3, 1, 2, 4)


def _attend_locally(
    query: Array,
    key: Array,
    value: Array,
    segment_ids: Array,
    *,
    window: int | None,
    cap: float | None,
    interpret: bool,
) -> Array:
    """Run the kernel on one device. query: [B, G, R, S, K]; the kernel expects the query heads of a key head to be adjacent."""
    _, groups, per_group, length, _ = query.shape
    shape = (length, length)
    mask = masks.CausalMask(shape) if window is None else masks.LocalMask(shape, (window - 1, 0), offset=0)
    block = next(size for size in BLOCKS if length % size == 0)
    kernel = kernels.make_splash_mha(
        masks.MultiHeadMask([mask] * (groups * per_group)),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=kernels.BlockSizes(
            block_q=block,
            block_kv=block,
            block_kv_compute=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_kv_dkv_compute=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        attn_logits_soft_cap=cap,
        residual_checkpoint_name=RESIDUALS,
        interpret=interpret,
    )

    def one_row(query: Array, key: Array, value: Array, segments: Array) -> Array:
        mixed: Array = kernel(query, key, value, kernels.SegmentIds(segments, segments))
        return mixed

    heads = query.reshape(query.shape[0], groups * per_group, length, -1)
    return jax.vmap(one_row)(heads, key, value, segment_ids).reshape(query.shape)

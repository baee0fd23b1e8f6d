"""Causal attention with grouped queries, sliding windows and soft-capped scores: `self_attention` and its implementations.

| implementation | platforms | compute_dtype | packed segments | sliding window | soft-cap |
|---|---|---|---|---|---|
| xla | all | all | yes | yes | yes |
| splash | tpu | bfloat16 | yes | yes | yes |
| cudnn | gpu | bfloat16, float16 | yes, by a dense mask | yes | no |

All are causal. On a mesh that splits columns (MeshConfig.sequence) xla becomes ring attention (`models.ring`); the
other implementations do not support such a mesh. "auto" selects splash on a TPU and cudnn on a GPU where they support
the layer, else xla. An implementation that is named and does not support the layer is an error. Decoding a token
(`attend` over a cache) always uses xla: a single query leaves nothing to tile.

Letters in shapes: B rows, S query columns, C key columns, G key/value heads, R query heads per key/value head, K
head_dim.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from rlhf_jax.errors import InputError
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.layout import Constrain
from rlhf_jax.models.ring import ring_attention
from rlhf_jax.models.splash import splash_attention
from rlhf_jax.models.weights import precision_of, soft_cap

Attend = Callable[[Array, Array, Array], Array]
"""(query [B, S, G, R, K], key [B, G, C, K], value [B, G, C, K]) -> mixed values [B, S, G, R, K]."""


@dataclasses.dataclass(frozen=True)
class Ability:
    """The platforms, dtypes and options that an implementation supports; None: all."""

    platforms: tuple[str, ...] | None = None
    dtypes: tuple[str, ...] | None = None
    soft_cap: bool = True
    split_columns: bool = False


ABILITIES = {
    "xla": Ability(split_columns=True),
    "splash": Ability(("tpu",), ("bfloat16",)),
    "cudnn": Ability(("gpu", "cuda"), ("bfloat16", "float16"), soft_cap=False),
}


def self_attention(
    config: ModelConfig, constrain: Constrain, segment_ids: Int32[Array, "B S"], window: int | None
) -> Attend:
    """Return the attention function of a layer over whole sequences, inside segments, by ``config.attention``.

    window: of the layer; None: all tokens before the query. Raises InputError when the implementation does not support
    the layer.
    """
    implementation = choose_implementation(config, constrain)
    scale = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
    cap, precision = config.attention_soft_cap, precision_of(config)
    if implementation == "splash":

        def splash(query: Array, key: Array, value: Array) -> Array:
            axes = ("act_batch", "act_kv_heads", "act_length", "act_head_dim")
            mesh, spec = constrain.mesh, constrain.spec(axes, key.shape)
            return splash_attention(
                query, key, value, segment_ids, window=window, scale=scale, cap=cap, mesh=mesh, key_spec=spec
            )

        return splash
    if implementation == "cudnn":
        return lambda query, key, value: fused_attention(
            query, key, value, segment_ids, window=window, scale=scale, implementation="cudnn"
        )
    if (parts := constrain.parts("act_length")) > 1:
        check_length(segment_ids.shape[1], parts)

        def ring(query: Array, key: Array, value: Array) -> Array:
            axes = ("act_batch", "act_kv_heads", "act_length", "act_head_dim")
            mesh, spec = constrain.mesh, constrain.spec(axes, key.shape)
            assert mesh is not None
            return ring_attention(
                query,
                key,
                value,
                segment_ids,
                window=window,
                scale=scale,
                cap=cap,
                precision=precision,
                mesh=mesh,
                key_spec=spec,
            )

        return ring
    if in_blocks(constrain):
        return lambda query, key, value: causal_attention(
            query, key, value, segment_ids, window, precision, scale=scale, cap=cap
        )
    mask = segment_mask(segment_ids, window)
    return lambda query, key, value: attend(query, key, value, mask, precision, scale=scale, cap=cap)


def _platform(constrain: Constrain) -> str:
    return jax.default_backend() if constrain.mesh is None else constrain.mesh.devices.flat[0].platform


def in_blocks(constrain: Constrain) -> bool:
    """Return whether "xla" is `causal_attention`: only on a CPU.

    On a TPU the blocks move more data between HBM and the cores: 13 % more time in a step of 1024 columns, for 5 %
    fewer operations.
    """
    return _platform(constrain) == "cpu"


def choose_implementation(config: ModelConfig, constrain: Constrain) -> str:
    """Return the name of the implementation that a model uses on its devices.

    Raises InputError when ``config.attention`` names one that does not support the configuration.
    """
    platform = _platform(constrain)
    split = constrain.parts("act_length") > 1
    if config.attention != "auto":
        if missing := _missing_support(ABILITIES[config.attention], config, platform, split):
            raise InputError(
                f"ModelConfig.attention = {config.attention!r} does not support {missing}; use 'auto' or 'xla' "
                "(rlhf_jax/models/attention.py has the table)"
            )
        return config.attention
    return next(
        name for name in ("splash", "cudnn", "xla") if not _missing_support(ABILITIES[name], config, platform, split)
    )


def check_length(columns: int, parts: int) -> None:
    """Raise InputError when the columns do not divide over the devices that split them."""
    if columns % parts:
        raise InputError(
            f"MeshConfig.sequence = {parts}: rows of {columns} columns do not divide; make BatchConfig.length (and "
            f"SamplingConfig.max_new_tokens) a multiple of {parts}"
        )


def _missing_support(ability: Ability, config: ModelConfig, platform: str, split: bool) -> str:
    """Return what the configuration or the platform needs and the implementation does not support, '' when nothing is missing."""
    if ability.platforms is not None and platform not in ability.platforms:
        return f"platform {platform!r} (only {', '.join(ability.platforms)})"
    if ability.dtypes is not None and config.compute_dtype not in ability.dtypes:
        return f"compute_dtype {config.compute_dtype!r} (only {', '.join(ability.dtypes)})"
    if config.attention_soft_cap is not None and not ability.soft_cap:
        return "attention_soft_cap"
    if split and not ability.split_columns:
        return "a mesh that splits columns (MeshConfig.sequence)"
    return ""


_MASKED = -1e30  # finite: a row without keys to attend to (padding) gives uniform weights instead of NaN


def segment_mask(segment_ids: Int32[Array, "B S"], window: int | None = None, first: int = 0) -> Bool[Array, "B Q S"]:
    """Return the mask of the keys that each query may attend to.

    Query column s may attend to key column c when both are in the same segment, neither is padding (segment 0), and s -
    window < c <= s. first: the column of the first query.
    """
    same = segment_ids[:, first:, None] == segment_ids[:, None, :]
    columns = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    causal = columns <= columns[first:, None]
    if window is not None:
        causal &= columns > columns[first:, None] - window
    return same & causal & (segment_ids > 0)[:, None, :]


def blocks(length: int, window: int | None) -> list[tuple[int, int, int]]:
    """Return (first query, end, first key) of each block of `causal_attention`; its keys end where its queries do.

    Up to 128 columns are one block; longer rows have up to eight blocks of at least 64 columns.
    """
    size = -(-length // min(8, length // 64)) if length > 128 else length
    ends = [(first, min(first + size, length)) for first in range(0, length, size)]
    return [(first, end, 0 if window is None else max(0, first - window + 1)) for first, end in ends]


def causal_attention(
    query: Float[Array, "B S G R K"],
    key: Float[Array, "B G S K"],
    value: Float[Array, "B G S K"],
    segment_ids: Int32[Array, "B S"],
    window: int | None,
    precision: jax.lax.Precision | None,
    *,
    scale: float,
    cap: float | None,
) -> Float[Array, "B S G R K"]:
    """Compute `attend` under `segment_mask`, a block of queries at a time and only with the keys that the block may attend to.

    Eight blocks compute 9/16 of the scores. A row of padding gets another mean of values than from `attend`.
    """
    mixed = []
    for first, end, low in blocks(query.shape[1], window):
        keys = slice(low, end)
        mask = segment_mask(segment_ids[:, keys], window, first - low)
        parts = (query[:, first:end], key[:, :, keys], value[:, :, keys])
        mixed.append(attend(*parts, mask, precision, scale=scale, cap=cap))
    return jnp.concatenate(mixed, axis=1)


def attend(
    query: Float[Array, "B S G R K"],
    key: Float[Array, "B G C K"],
    value: Float[Array, "B G C K"],
    mask: Bool[Array, "B S C"],
    precision: jax.lax.Precision | None,
    *,
    scale: float | None = None,
    cap: float | None = None,
) -> Float[Array, "B S G R K"]:
    """Compute softmax attention; scores and softmax in float32, the result in the dtype of ``value``.

    scale: of the scores, None = K^-1/2. cap: `soft_cap` of the scaled scores.
    The R query heads of a key/value head are rows of one matrix, and the sum of the weights divides the [S, K] result
    instead of the [S, C] weights: both save a pass over the largest array of the function.
    """
    batch, length, groups, per_group, size = query.shape
    rows = query.transpose(0, 2, 3, 1, 4).reshape(batch, groups, per_group * length, size)
    scores = jnp.einsum("bgqk,bgck->bgqc", rows, key, precision=precision, preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, groups, per_group, length, -1) * (size**-0.5 if scale is None else scale)
    scores = jnp.where(mask[:, None, None], soft_cap(scores, cap), _MASKED)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    total = weights.sum(axis=-1, keepdims=True)  # [B, G, R, S, 1], at least 1
    rows = weights.astype(value.dtype).reshape(batch, groups, per_group * length, -1)
    mixed = jnp.einsum("bgqc,bgck->bgqk", rows, value, precision=precision, preferred_element_type=jnp.float32)
    mixed = (mixed.reshape(batch, groups, per_group, length, size) / total).astype(value.dtype)
    return mixed.transpose(0, 3, 1, 2, 4)


def fused_attention(
    query: Float[Array, "B S G R K"],
    key: Float[Array, "B G S K"],
    value: Float[Array, "B G S K"],
    segment_ids: Int32[Array, "B S"],
    *,
    window: int | None,
    scale: float,
    implementation: Literal["cudnn", "xla"],
) -> Float[Array, "B S G R K"]:
    """Compute causal attention inside segments by `jax.nn.dot_product_attention`.

    implementation: "cudnn" is cuDNN's fused kernel, "xla" JAX's own. The results of padding columns may differ from
    `attend`: padding attends to padding.
    """
    batch, length, groups, per_group, size = query.shape
    mixed = jax.nn.dot_product_attention(
        query.reshape(batch, length, groups * per_group, size),
        key.swapaxes(1, 2),
        value.swapaxes(1, 2),
        mask=(segment_ids[:, None, :, None] == segment_ids[:, None, None, :]),
        scale=scale,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation=implementation,
    )
    return mixed.reshape(query.shape)

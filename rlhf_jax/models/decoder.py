"""The decoder transformer as Flax NNX modules.

Only `models.model` sees these modules; everyone else sees a `Model` and a plain dict of arrays. Letters in shapes: B rows,
S columns, D hidden size, H query heads, G key/value heads, K head_dim, F feed-forward size, V vocabulary, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32

from rlhf_jax.models.attention import attend, rotary, segment_mask
from rlhf_jax.models.cache import KVCache
from rlhf_jax.models.config import ModelConfig

Constrain = Callable[[Array, tuple[str, ...]], Array]
"""(activation, logical axis names) -> the same activation with its sharding constrained."""


def _precision(config: ModelConfig) -> jax.lax.Precision | None:
    """float32 models multiply in float32 on every platform (a TPU would otherwise use one bfloat16 pass)."""
    return jax.lax.Precision.HIGHEST if config.compute_dtype == "float32" else None


class Kernel(nnx.Module):
    """A weight matrix, N(0, 1/fan_in) truncated at two sigma, applied by an einsum over rows (``n`` = B * S).

    Rows and not [B, S]: the gradient of the weights then contracts over one dimension. Over two, XLA on a CPU writes a
    transposed copy of the activations first, which doubles the backward pass of a small model.
    """

    def __init__(
        self, config: ModelConfig, shape: tuple[int, ...], axes: tuple[str, ...], fan_in: int, *, rngs: nnx.Rngs
    ):
        draw = jax.random.truncated_normal(rngs.params(), -2.0, 2.0, shape, jnp.float32) / math.sqrt(fan_in)
        self.kernel = nnx.Param(draw.astype(config.param_dtype), sharding_names=axes)
        self._dtype, self._precision = config.dtype, _precision(config)

    def __call__(self, equation: str, x: Array) -> Array:
        """x: [B, S, ...]; the equation sees [n, ...]."""
        rows = x.reshape(-1, *x.shape[2:])
        out = jnp.einsum(equation, rows, self.kernel[...].astype(self._dtype), precision=self._precision)
        return out.reshape(*x.shape[:2], *out.shape[1:])


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, in float32 (Zhang and Sennrich 2019, eq. 4)."""

    def __init__(self, config: ModelConfig):
        self.scale = nnx.Param(jnp.ones((config.hidden_size,), config.param_dtype), sharding_names=("norm",))
        self._epsilon, self._dtype = config.norm_epsilon, config.dtype

    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self._epsilon)
        return (normed * self.scale[...].astype(jnp.float32)).astype(self._dtype)


class Attention(nnx.Module):
    """Grouped-query attention (Ainslie et al. 2023) with rotary positions."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        d, h, g, k = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        self.query = Kernel(config, (d, h, k), ("embed", "heads", "head_dim"), d, rngs=rngs)
        self.key = Kernel(config, (d, g, k), ("embed", "kv_heads", "head_dim"), d, rngs=rngs)
        self.value = Kernel(config, (d, g, k), ("embed", "kv_heads", "head_dim"), d, rngs=rngs)
        self.output = Kernel(config, (h, k, d), ("heads", "head_dim", "embed"), h * k, rngs=rngs)
        self._config = config

    def project(self, x: Float[Array, "B S D"], positions: Int32[Array, "B S"]) -> tuple[Array, Array, Array]:
        """Rotated queries [B, S, G, R, K], rotated keys [B, G, S, K] and values [B, G, S, K]."""
        config = self._config
        query = rotary(self.query("nd,dhk->nhk", x), positions, config.rope_theta)
        key = rotary(self.key("nd,dgk->ngk", x), positions, config.rope_theta)
        value = self.value("nd,dgk->ngk", x)
        groups = (config.num_kv_heads, config.num_heads // config.num_kv_heads)
        query = query.reshape(*query.shape[:2], *groups, config.head_dim)
        return query, key.swapaxes(1, 2), value.swapaxes(1, 2)

    def __call__(self, query: Array, key: Array, value: Array, mask: Array) -> Float[Array, "B S D"]:
        """Attend and project back to the residual stream."""
        mixed = attend(query, key, value, mask, _precision(self._config))
        return self.output("nhk,hkd->nd", mixed.reshape(*mixed.shape[:2], -1, mixed.shape[-1]))


class GatedMLP(nnx.Module):
    """silu(x gate) * (x up) projected down (Shazeer 2020, SwiGLU)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        d, f = config.hidden_size, config.ffn_size
        self.gate = Kernel(config, (d, f), ("embed", "mlp"), d, rngs=rngs)
        self.up = Kernel(config, (d, f), ("embed", "mlp"), d, rngs=rngs)
        self.down = Kernel(config, (f, d), ("mlp", "embed"), f, rngs=rngs)

    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        return self.down("nf,fd->nd", jax.nn.silu(self.gate("nd,df->nf", x)) * self.up("nd,df->nf", x))


class Block(nnx.Module):
    """Pre-norm residual block. What differs between training and decoding is only where keys and values come from."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = RMSNorm(config)
        self.mlp = GatedMLP(config, rngs=rngs)

    def read(self, x: Float[Array, "B S D"], positions: Int32[Array, "B S"]) -> tuple[Array, Array, Array]:
        """Query, key and value of this block's input."""
        return self.attention.project(self.attention_norm(x), positions)

    def __call__(self, x: Array, query: Array, key: Array, value: Array, mask: Array) -> Float[Array, "B S D"]:
        x = x + self.attention(query, key, value, mask)
        return x + self.mlp(self.mlp_norm(x))


class Embedding(nnx.Module):
    """The token table. Its width has its own logical axis: the weights' FSDP axis there would make XLA replicate activations."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        draw = 0.02 * jax.random.normal(rngs.params(), (config.vocab_size, config.hidden_size), jnp.float32)
        self.embedding = nnx.Param(draw.astype(config.param_dtype), sharding_names=("vocab", "embed_table"))


class ScalarHead(nnx.Module):
    """One number per token: Linear(D, 1) with N(0, 1/sqrt(D + 1)) weights and zero bias (Ziegler et al. 2019, their code)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        std = (config.hidden_size + 1) ** -0.5
        draw = std * jax.random.normal(rngs.params(), (config.hidden_size, 1), jnp.float32)
        self.kernel = nnx.Param(draw.astype(config.param_dtype), sharding_names=("norm", "scalar"))
        self.bias = nnx.Param(jnp.zeros((1,), config.param_dtype), sharding_names=("scalar",))

    def __call__(self, hidden: Float[Array, "B S D"]) -> Float[Array, "B S"]:
        kernel, bias = self.kernel[...].astype(jnp.float32), self.bias[...].astype(jnp.float32)
        return jnp.einsum("bsd,do->bso", hidden.astype(jnp.float32), kernel, precision="highest")[..., 0] + bias[0]


class Decoder(nnx.Module):
    """Token table, L stacked blocks run by one scan, final norm, heads."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers"})
        def stacked_blocks(rngs: nnx.Rngs) -> Block:
            return Block(config, rngs=rngs)

        self.embed = Embedding(config, rngs=rngs)
        self.layers = stacked_blocks(rngs)
        self.final_norm = RMSNorm(config)
        if config.has_lm and not config.tie_embeddings:
            axes = ("embed_table", "vocab")
            self.lm_head = Kernel(config, (config.hidden_size, config.vocab_size), axes, config.hidden_size, rngs=rngs)
        if config.has_scalar:
            self.scalar_head = ScalarHead(config, rngs=rngs)
        self._config = config

    def _embed(self, tokens: Int32[Array, "B S"], constrain: Constrain) -> Float[Array, "B S D"]:
        rows = jnp.take(self.embed.embedding[...], tokens, axis=0).astype(self._config.dtype)
        return constrain(rows, ("act_batch", "act_length", "act_embed"))

    def hidden(
        self,
        tokens: Int32[Array, "B S"],
        positions: Int32[Array, "B S"],
        segment_ids: Int32[Array, "B S"],
        constrain: Constrain,
        keep_keys_and_values: bool = False,
    ) -> tuple[Float[Array, "B S D"], Any]:
        """Final hidden states, and (keys, values) [L, B, G, S, K] of every layer when asked for (else None)."""
        mask = segment_mask(segment_ids)
        definition, weights = nnx.split(self.layers)

        def body(x: Array, layer: Any) -> tuple[Array, Any]:
            block = nnx.merge(definition, layer)
            query, key, value = block.read(x, positions)
            x = constrain(block(x, query, key, value, mask), ("act_batch", "act_length", "act_embed"))
            return x, ((key, value) if keep_keys_and_values else None)

        if self._config.remat:
            body = jax.checkpoint(body, prevent_cse=False)
        x, kept = jax.lax.scan(body, self._embed(tokens, constrain), weights)
        return self.final_norm(x), kept

    def decode(
        self, tokens: Int32[Array, "B 1"], positions: Int32[Array, "B 1"], cache: KVCache, constrain: Constrain
    ) -> tuple[Float[Array, "B 1 D"], KVCache]:
        """One more column for every row. The cache travels in the carry of the layer scan and is updated in place."""
        definition, weights = nnx.split(self.layers)
        valid = jax.lax.dynamic_update_slice_in_dim(cache.valid, jnp.ones_like(tokens, dtype=bool), cache.index, axis=1)
        zero = jnp.zeros((), jnp.int32)

        def body(
            carry: tuple[Array, Array, Array], scanned: tuple[Array, Any]
        ) -> tuple[tuple[Array, Array, Array], None]:
            x, keys, values = carry
            layer_index, layer = scanned
            block = nnx.merge(definition, layer)
            query, key, value = block.read(x, positions)
            where = (layer_index, zero, zero, cache.index, zero)
            keys = jax.lax.dynamic_update_slice(keys, key[None], where)
            values = jax.lax.dynamic_update_slice(values, value[None], where)
            seen_keys, seen_values = (
                jax.lax.dynamic_index_in_dim(stack, layer_index, keepdims=False) for stack in (keys, values)
            )
            return (block(x, query, seen_keys, seen_values, valid[:, None, :]), keys, values), None

        carry = (self._embed(tokens, constrain), cache.keys, cache.values)
        layer_indices = jnp.arange(self._config.num_layers, dtype=jnp.int32)
        (x, keys, values), _ = jax.lax.scan(body, carry, (layer_indices, weights))
        return self.final_norm(x), KVCache(keys, values, valid, cache.index + 1)

    def logits(self, hidden: Float[Array, "B S D"], constrain: Constrain) -> Float[Array, "B S V"]:
        """Float32 logits."""
        table = self.embed.embedding[...].T if self._config.tie_embeddings else self.lm_head.kernel[...]
        out = jnp.einsum(
            "bsd,dv->bsv",
            hidden,
            table.astype(self._config.dtype),
            precision=_precision(self._config),
            preferred_element_type=jnp.float32,
        )
        return constrain(out, ("act_batch", "act_length", "act_vocab"))

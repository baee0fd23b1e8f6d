"""The parts of a decoder as Flax NNX modules: matrices, norms, attention, feed-forward, the block they make, heads.

Letters in shapes: B rows, S columns, D hidden size, H query heads, G key/value heads, K head_dim, F feed-forward size.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32

from rlhf_jax.models.attention import Attend
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.layer_kinds import LayerKind
from rlhf_jax.models.layout import Constrain
from rlhf_jax.models.moe import Experts, Routing
from rlhf_jax.models.rope import rotary
from rlhf_jax.models.weights import Kernel, Matrix

_ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


class Norm(nnx.Module):
    """RMSNorm (Zhang and Sennrich 2019, eq. 4) or layer norm (Ba et al. 2016).

    x / rms(x) * scale, or (x - mean) / std * scale + bias, in float32 over the last axes of ``x`` that ``shape`` names.
    ``norm_offset`` is added to the scale, which is initialized such that the factor is 1.
    """

    def __init__(self, config: ModelConfig, shape: tuple[int, ...], axes: tuple[str, ...], *, kind: str | None = None):
        start = jnp.full(shape, 1.0 - config.norm_offset, config.param_dtype)
        self.scale = nnx.Param(start, sharding_names=axes)
        self._centred = (kind or config.norm) == "layer"
        if self._centred:
            self.bias = nnx.Param(jnp.zeros(shape, config.param_dtype), sharding_names=axes)
        self._over = tuple(range(-len(shape), 0))
        self._epsilon, self._offset, self._dtype = config.norm_epsilon, config.norm_offset, config.dtype

    def __call__(self, x: Array) -> Array:
        x32 = x.astype(jnp.float32)
        if self._centred:
            x32 = x32 - jnp.mean(x32, axis=self._over, keepdims=True)
        normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=self._over, keepdims=True) + self._epsilon)
        scale = self.scale[...].astype(jnp.float32)
        normed = normed * (scale + self._offset if self._offset else scale)
        if self._centred:
            normed = normed + self.bias[...].astype(jnp.float32)
        return normed.astype(self._dtype)


def hidden_norm(config: ModelConfig) -> Norm:
    """Return a norm of the residual stream."""
    return Norm(config, (config.hidden_size,), ("norm",))


class Attention(nnx.Module):
    """Grouped-query attention (Ainslie et al. 2023)."""

    def __init__(self, config: ModelConfig, kind: LayerKind, *, rngs: nnx.Rngs):
        d, h, g, k = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        bias = config.qkv_bias
        self.query = Kernel(config, (d, h, k), ("embed", "heads", "head_dim"), bias=bias, rngs=rngs)
        self.key = Kernel(config, (d, g, k), ("embed", "kv_heads", "head_dim"), bias=bias, rngs=rngs)
        self.value = Kernel(config, (d, g, k), ("embed", "kv_heads", "head_dim"), bias=bias, rngs=rngs)
        out = ("heads", "head_dim", "embed")
        self.output = Kernel(config, (h, k, d), out, inputs=2, bias=config.output_bias, rngs=rngs)
        if config.qk_norm == "head":
            self.query_norm = Norm(config, (k,), ("head_dim",), kind="rms")
            self.key_norm = Norm(config, (k,), ("head_dim",), kind="rms")
        elif config.qk_norm == "width":
            self.query_norm = Norm(config, (h, k), ("heads", "head_dim"), kind="rms")
            self.key_norm = Norm(config, (g, k), ("kv_heads", "head_dim"), kind="rms")
        self._config, self._rope = config, kind.rope

    def project(self, x: Float[Array, "B S D"], positions: Int32[Array, "B S"]) -> tuple[Array, Array, Array]:
        """Return queries [B, S, G, R, K], keys and values [B, G, S, K]; queries and keys are normed and rotated."""
        config = self._config
        query, key = self.query("nd,dhk->nhk", x), self.key("nd,dgk->ngk", x)
        if config.qk_norm != "none":
            query, key = self.query_norm(query), self.key_norm(key)
        if self._rope is not None:
            query, key = rotary(query, positions, self._rope), rotary(key, positions, self._rope)
        value = self.value("nd,dgk->ngk", x)
        groups = (config.num_kv_heads, config.num_heads // config.num_kv_heads)
        query = query.reshape(*query.shape[:2], *groups, config.head_dim)
        return query, key.swapaxes(1, 2), value.swapaxes(1, 2)

    def __call__(self, query: Array, key: Array, value: Array, attend: Attend) -> Float[Array, "B S D"]:
        """Attend and project back to the residual stream."""
        mixed = attend(query, key, value)
        return self.output("nhk,hkd->nd", mixed.reshape(*mixed.shape[:2], -1, mixed.shape[-1]))


class MLP(nnx.Module):
    """act(x gate) * (x up), projected down (Shazeer 2020, GLU variants); without a gate act(x up), projected down."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        d, f, bias = config.hidden_size, config.ffn_size, config.mlp_bias
        if config.gated_mlp:
            self.gate = Kernel(config, (d, f), ("embed", "mlp"), bias=bias, rngs=rngs)
        self.up = Kernel(config, (d, f), ("embed", "mlp"), bias=bias, rngs=rngs)
        self.down = Kernel(config, (f, d), ("mlp", "embed"), bias=bias, rngs=rngs)
        self._gated, self._activation = config.gated_mlp, config.activation

    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        act = _ACTIVATIONS[self._activation]
        if self._gated:
            return self.down("nf,fd->nd", act(self.gate("nd,df->nf", x)) * self.up("nd,df->nf", x))
        return self.down("nf,fd->nd", act(self.up("nd,df->nf", x)))


class Block(nnx.Module):
    """A residual block. Training and decoding differ only in the source of keys and values."""

    def __init__(self, config: ModelConfig, kind: LayerKind, *, rngs: nnx.Rngs):
        before, after = config.norm_placement in ("pre", "both"), config.norm_placement in ("post", "both")
        if before:
            self.attention_norm = hidden_norm(config)
        self.attention = Attention(config, kind, rngs=rngs)
        if after:
            self.attention_post_norm = hidden_norm(config)
        if before:
            self.mlp_norm = hidden_norm(config)
        self.mlp = (
            Experts(config, _ACTIVATIONS[config.activation], rngs=rngs) if kind.experts else MLP(config, rngs=rngs)
        )
        if after:
            self.mlp_post_norm = hidden_norm(config)
        self._before, self._after, self._parallel = before, after, config.parallel_residual

    def read(self, x: Float[Array, "B S D"], positions: Int32[Array, "B S"]) -> tuple[Array, Array, Array]:
        """Return query, key and value of this block's input."""
        return self.attention.project(self.attention_norm(x) if self._before else x, positions)

    def __call__(
        self, x: Array, query: Array, key: Array, value: Array, attend: Attend, constrain: Constrain
    ) -> tuple[Float[Array, "B S D"], Routing | None]:
        """Return the residual stream after the block, and the routing of its experts (None without experts)."""
        mixed = self.attention(query, key, value, attend)
        if self._after:
            mixed = self.attention_post_norm(mixed)
        middle = x + mixed
        source = x if self._parallel else middle
        read = self.mlp_norm(source) if self._before else source
        out, routing = self.mlp(read, constrain) if isinstance(self.mlp, Experts) else (self.mlp(read), None)
        if self._after:
            out = self.mlp_post_norm(out)
        return middle + out, routing


class Embedding(nnx.Module):
    """An embedding table. Its width has its own logical axis: the FSDP axis of weights would make XLA replicate activations."""

    def __init__(self, config: ModelConfig, rows: int, axis: str, *, rngs: nnx.Rngs):
        draw = 0.02 * jax.random.normal(rngs.params(), (rows, config.hidden_size), jnp.float32)
        self.embedding = Matrix(draw.astype(config.param_dtype), sharding_names=(axis, "embed_table"))


class ScalarHead(nnx.Module):
    """A scalar per token: Linear(D, 1) with N(0, 1/sqrt(D + 1)) weights and zero bias (Ziegler et al. 2019, their code)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        std = (config.hidden_size + 1) ** -0.5
        draw = std * jax.random.normal(rngs.params(), (config.hidden_size, 1), jnp.float32)
        self.kernel = Matrix(draw.astype(config.param_dtype), sharding_names=("norm", "scalar"))
        self.bias = nnx.Param(jnp.zeros((1,), config.param_dtype), sharding_names=("scalar",))

    def __call__(self, hidden: Float[Array, "B S D"]) -> Float[Array, "B S"]:
        kernel, bias = self.kernel[...].astype(jnp.float32), self.bias[...].astype(jnp.float32)
        return jnp.einsum("bsd,do->bso", hidden.astype(jnp.float32), kernel, precision="highest")[..., 0] + bias[0]

"""`ModelConfig`: the architecture of a decoder transformer as data."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from rlhf_jax.errors import InputError
from rlhf_jax.models.layer_kinds import LayerGroup, LayerKind, group_layers
from rlhf_jax.models.rope import Rope, RopeScaling
from rlhf_jax.storage.files import json_text, parse_object

Head = Literal["lm", "scalar", "lm+scalar"]
DTYPES = ("float32", "bfloat16", "float16")
_CHOICES: dict[str, tuple[str, ...]] = {
    "head": ("lm", "scalar", "lm+scalar"),
    "attention": ("auto", "xla", "splash", "cudnn"),
    "param_dtype": DTYPES,
    "compute_dtype": DTYPES,
    "norm": ("rms", "layer"),
    "norm_placement": ("pre", "post", "both"),
    "positions": ("rotary", "learned"),
    "qk_norm": ("none", "head", "width"),
    "activation": ("silu", "gelu", "gelu_tanh"),
}
_MOST, _MOST_LAYERS = 2**31 - 1, 100_000
_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "ffn_size",
    "max_length",
    "logits_chunk",
)
_COUNTS = ("num_experts", "experts_per_token", "expert_ffn_size")
_POSITIVE = ("rope_theta", "norm_epsilon", "rope_fraction")
_POSITIVE_OR_NONE = ("rope_theta_sliding", "attention_scale", "attention_soft_cap", "logit_soft_cap")
_FLAGS = (
    "tie_embeddings",
    "scale_embeddings",
    "parallel_residual",
    "qkv_bias",
    "output_bias",
    "gated_mlp",
    "mlp_bias",
    "normalize_expert_weights",
)
_LAYERS = ("full", "sliding", "full_nope", "sliding_nope")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The architecture of a decoder transformer.

    The defaults are the Llama layout: RMSNorm before each part, rotary positions, SwiGLU.

    vocab_size: rows of the token table.
    hidden_size: width of the residual stream.
    num_layers: number of layers.
    num_heads: query heads, a multiple of num_kv_heads.
    num_kv_heads: key and value heads.
    head_dim: width of a head.
    ffn_size: width of the feed-forward part.
    max_length: longest sequence in tokens.
    head: "lm" (logits), "scalar" (reward or value) or "lm+scalar" (policy and value share a trunk).
    param_dtype: dtype of the stored parameters.
    compute_dtype: dtype of activations and matrix products. Logits and scalars are always float32.
    remat: what the backward pass recomputes of a block: nothing (False), everything from its input (True), or "cheap",
    everything but the products with weights, which are stored (docs/memory.md).
    logits_chunk: columns of a batch whose logits exist at a time when tokens are scored; changes memory, not numbers
    (docs/memory.md).
    attention: the implementation (`models.attention` has the table).
    family: the checkpoint format of exports.
    tie_embeddings: use the transposed token table as the output projection.
    scale_embeddings: multiply embeddings by sqrt(hidden_size).
    logit_soft_cap: c in c tanh(logits / c); None = no cap.
    norm: "rms", or "layer" with mean and bias.
    norm_placement: "pre" (before each part), "post" (on what the part adds to the residual stream) or "both".
    norm_epsilon: added to the variance.
    norm_offset: added to the stored scales.
    positions: "rotary", or "learned", a table.
    rope_theta: base of the rotary frequencies.
    rope_fraction: the leading fraction of a head that rotates.
    rope_scaling: scaling of the rotary frequencies for longer contexts.
    rope_theta_sliding: base of the sliding-window layers, which are then not scaled; None = as the others.
    layer_pattern: repeated over the layers: "full" attention, "sliding" (the last sliding_window tokens), "full_nope" and
    "sliding_nope" (no rotary positions); () = all full.
    sliding_window: tokens that a sliding-window layer sees.
    qkv_bias: add a bias to queries, keys and values.
    output_bias: add a bias to the output of attention.
    qk_norm: normalize queries and keys per "head", or over the "width" of all heads.
    attention_scale: factor of the scores; None = head_dim^-1/2.
    attention_soft_cap: c in c tanh(scores / c); None = no cap.
    parallel_residual: attention and feed-forward both read the input of the block.
    activation: of the feed-forward part; "gelu" is exact, "gelu_tanh" approximate.
    gated_mlp: act(x gate) * (x up), otherwise act(x up).
    mlp_bias: add biases to the feed-forward part.
    num_experts: experts of a layer; 0 = a dense feed-forward part.
    experts_per_token: experts that the router selects for a token, weighted by their softmax.
    expert_ffn_size: width of an expert.
    normalize_expert_weights: normalize the weights over the selected experts.
    dense_layers: layers without experts.
    router_coefficient: weight of the load-balancing loss.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    max_length: int = 2048
    rope_theta: float = 10000.0
    norm_epsilon: float = 1e-5
    tie_embeddings: bool = True
    head: Head = "lm"
    param_dtype: str = "float32"
    compute_dtype: str = "float32"
    remat: bool | Literal["cheap"] = False
    logits_chunk: int = 128
    attention: Literal["auto", "xla", "splash", "cudnn"] = "auto"
    family: str = "llama"
    scale_embeddings: bool = False
    logit_soft_cap: float | None = None
    norm: Literal["rms", "layer"] = "rms"
    norm_placement: Literal["pre", "post", "both"] = "pre"
    norm_offset: float = 0.0
    positions: Literal["rotary", "learned"] = "rotary"
    rope_fraction: float = 1.0
    rope_scaling: RopeScaling | None = None
    rope_theta_sliding: float | None = None
    layer_pattern: tuple[str, ...] = ()
    sliding_window: int | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: Literal["none", "head", "width"] = "none"
    attention_scale: float | None = None
    attention_soft_cap: float | None = None
    parallel_residual: bool = False
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    gated_mlp: bool = True
    mlp_bias: bool = False
    num_experts: int = 0
    experts_per_token: int = 0
    expert_ffn_size: int = 0
    normalize_expert_weights: bool = True
    dense_layers: tuple[int, ...] = ()
    router_coefficient: float = 0.0

    def __post_init__(self) -> None:
        for name in ("layer_pattern", "dense_layers"):
            value = getattr(self, name)
            if not isinstance(value, tuple | list):
                raise InputError(f"ModelConfig.{name} = {value!r}: give a tuple")
            object.__setattr__(self, name, tuple(value))  # JSON gives lists
        self._check_types()
        self._check_sizes()
        self._check_layers()
        self._check_experts()

    def _check_types(self) -> None:
        for name in (*_SIZES, *_COUNTS):
            value, least = getattr(self, name), 0 if name in _COUNTS else 1
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
                kind = "a positive whole number" if least else "a whole number >= 0"
                raise InputError(f"ModelConfig.{name} = {value!r}: give {kind}")
            if value > (most := _MOST_LAYERS if name == "num_layers" else _MOST):
                raise InputError(f"ModelConfig.{name} = {value!r}: give at most {most}")
        for name in (*_POSITIVE, *_POSITIVE_OR_NONE):
            value = getattr(self, name)
            if value is None and name in _POSITIVE_OR_NONE:
                continue
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
                raise InputError(f"ModelConfig.{name} = {value!r}: give a positive number")
        for name in ("norm_offset", "router_coefficient"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < float("inf"):
                raise InputError(f"ModelConfig.{name} = {value!r}: give a number >= 0")
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):  # gin reads 'False' as a string, which is true
                raise InputError(f"ModelConfig.{name} = {getattr(self, name)!r}: give True or False")
        if not (isinstance(self.remat, bool) or self.remat == "cheap"):
            raise InputError(f"ModelConfig.remat = {self.remat!r}: give True, False or 'cheap'")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise InputError(f"ModelConfig.{name} = {getattr(self, name)!r}: one of {', '.join(choices)}")
        if not isinstance(self.family, str):
            raise InputError(f"ModelConfig.family = {self.family!r}: give the name of a checkpoint format")

    def _check_sizes(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"ModelConfig.num_heads = {self.num_heads} is not a multiple of num_kv_heads = {self.num_kv_heads}"
            )
        if self.positions == "learned":
            if self.rope_scaling is not None or self.rope_theta_sliding is not None:
                raise InputError("ModelConfig.positions = 'learned': remove rope_scaling and rope_theta_sliding")
            return
        if self.head_dim % 2:
            raise InputError(f"ModelConfig.head_dim = {self.head_dim}: rotary positions need an even head_dim")
        if self.rope_fraction > 1 or self.rotary_size < 2 or self.rotary_size % 2:
            raise InputError(
                f"ModelConfig.rope_fraction = {self.rope_fraction}: of head_dim = {self.head_dim} an even number of "
                "dimensions must be rotated, at least 2"
            )
        scaling = self.rope_scaling
        if scaling is None:
            return
        if not isinstance(scaling, RopeScaling):
            raise InputError(f"ModelConfig.rope_scaling = {scaling!r}: give a RopeScaling or None")
        for name in ("short_factors", "long_factors"):
            count = len(getattr(scaling, name))
            if count != (self.rotary_size // 2 if scaling.kind == "longrope" else 0):
                raise InputError(
                    f"ModelConfig.rope_scaling: {name}: {count} numbers; kind 'longrope' needs {self.rotary_size // 2}, "
                    "others none"
                )

    def _check_layers(self) -> None:
        for kind in self.layer_pattern:
            if kind not in _LAYERS:
                raise InputError(f"ModelConfig.layer_pattern: {kind!r} is none of {', '.join(_LAYERS)}")
        if len(self.layer_pattern) > self.num_layers:
            raise InputError(
                f"ModelConfig.layer_pattern: {len(self.layer_pattern)} kinds for num_layers = {self.num_layers}"
            )
        window, slides = self.sliding_window, any("sliding" in kind for kind in self.layer_pattern)
        if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
            raise InputError(f"ModelConfig.sliding_window = {window!r}: give a positive number of tokens, or None")
        if slides != (window is not None):
            raise InputError(
                f"ModelConfig.sliding_window = {window!r} with layer_pattern = {self.layer_pattern}: sliding layers need a "
                "window, and a window sliding layers"
            )
        if self.rope_theta_sliding is not None and not slides:
            raise InputError("ModelConfig.rope_theta_sliding: needs sliding layers in layer_pattern")

    def _check_experts(self) -> None:
        if not self.num_experts:
            if self.experts_per_token or self.expert_ffn_size or self.dense_layers or self.router_coefficient:
                raise InputError(
                    "ModelConfig.num_experts = 0: remove experts_per_token, expert_ffn_size, dense_layers and "
                    "router_coefficient"
                )
            return
        if not 1 <= self.experts_per_token <= self.num_experts or not self.expert_ffn_size:
            raise InputError(
                f"ModelConfig.experts_per_token = {self.experts_per_token}, expert_ffn_size = {self.expert_ffn_size}: "
                f"give 1 to num_experts = {self.num_experts} experts of a positive width"
            )
        if self.mlp_bias or not self.gated_mlp:
            raise InputError("ModelConfig.num_experts: experts are gated and without biases")
        if list(self.dense_layers) != sorted({layer for layer in self.dense_layers if 0 <= layer < self.num_layers}):
            raise InputError(
                f"ModelConfig.dense_layers = {self.dense_layers}: ascending layer numbers below num_layers = {self.num_layers}"
            )

    @property
    def has_lm(self) -> bool:
        """Whether the model has logits."""
        return self.head in ("lm", "lm+scalar")

    @property
    def has_scalar(self) -> bool:
        """Whether the model has a scalar per token."""
        return self.head in ("scalar", "lm+scalar")

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of activations."""
        return jnp.dtype(self.compute_dtype)

    @property
    def rotary_size(self) -> int:
        """The number of rotated dimensions of a head."""
        return int(self.head_dim * self.rope_fraction)

    def layer(self, index: int) -> LayerKind:
        """Return the kind of layer ``index``."""
        name = self.layer_pattern[index % len(self.layer_pattern)] if self.layer_pattern else "full"
        slides = name.startswith("sliding")
        rope = None
        if self.positions == "rotary" and not name.endswith("_nope"):
            if slides and self.rope_theta_sliding is not None:
                rope = Rope(self.rope_theta_sliding, self.rotary_size)
            else:
                long = self.rope_scaling is not None and self.max_length > self.rope_scaling.original_max_length
                rope = Rope(self.rope_theta, self.rotary_size, self.rope_scaling, long)
        experts = self.num_experts > 0 and index not in self.dense_layers
        return LayerKind(self.sliding_window if slides else None, rope, experts)

    @property
    def slides(self) -> tuple[bool, ...]:
        """For every layer, whether it has a sliding window."""
        return tuple(self.layer(index).window is not None for index in range(self.num_layers))

    def layer_groups(self) -> tuple[LayerGroup, ...]:
        """Return the layers as repeating blocks (`layer_kinds.group_layers`)."""
        return group_layers([self.layer(index) for index in range(self.num_layers)])

    def layer_stacks(self) -> tuple[tuple[str, range], ...]:
        """Return (path of the parameters, the layers stacked there), in the order of the first layer.

        The path is "layers" when all layers are alike; else "layers/N", N the first layer of the stack.
        """
        groups = self.layer_groups()
        if len(groups) == 1 and len(groups[0].kinds) == 1:
            return (("layers", range(self.num_layers)),)
        return tuple((f"layers/{stack.start}", stack) for group in groups for stack in group.stacks())

    def replace(self, **changes: Any) -> ModelConfig:
        """Return a copy with some fields changed (and checked)."""
        return dataclasses.replace(self, **changes)

    def to_json(self) -> str:
        """Return the fields as indented JSON: the contents of ``model.json`` in a run directory."""
        return json_text(dataclasses.asdict(self), indent=2, sort_keys=True)

    @classmethod
    def from_json(cls, text: str, where: str = "model.json") -> ModelConfig:
        """Return the configuration of a `to_json` text. Raises InputError naming unknown or missing fields."""
        fields = parse_object(text, where)
        names = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(fields) - names):
            raise InputError(f"{where}: unknown fields {', '.join(unknown)}: was it written by another version?")
        try:
            if isinstance(fields.get("rope_scaling"), dict):
                fields["rope_scaling"] = RopeScaling(**fields["rope_scaling"])
            return cls(**fields)
        except TypeError as error:
            raise InputError(f"{where}: {error}") from error

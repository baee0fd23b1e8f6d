"""What distinguishes one decoder transformer from another, as data."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from rlhf_jax.types import InputError

Head = Literal["lm", "scalar", "lm+scalar"]
_HEADS = ("lm", "scalar", "lm+scalar")
_DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """One decoder transformer of the Llama layout: RMSNorm, rotary positions, grouped queries, SwiGLU.

    vocab_size, hidden_size, num_layers, num_heads, num_kv_heads, head_dim, ffn_size: sizes; ``num_heads`` is a multiple
    of ``num_kv_heads``. max_length: longest sequence in tokens. rope_theta: base of the rotary frequencies.
    tie_embeddings: the output projection is the transposed embedding table. head: what stands on the trunk, "lm"
    (logits), "scalar" (reward or value) or "lm+scalar" (policy and value sharing a trunk). param_dtype: dtype in which
    parameters are kept; compute_dtype: of activations and matmuls. Logits and scalars are float32 whatever these are.
    remat: recompute each block in the backward pass instead of keeping its activations.
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
    remat: bool = False

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "ffn_size",
            "max_length",
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value <= 0:
                raise InputError(f"ModelConfig.{name} = {value!r}: give a positive whole number")
        for name in ("rope_theta", "norm_epsilon"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
                raise InputError(f"ModelConfig.{name} = {value!r}: give a positive number")
        for name in ("tie_embeddings", "remat"):
            if not isinstance(getattr(self, name), bool):  # gin reads 'False' as a string, which is true
                raise InputError(f"ModelConfig.{name} = {getattr(self, name)!r}: give True or False")
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"ModelConfig.num_heads = {self.num_heads} is not a multiple of num_kv_heads = {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise InputError(f"ModelConfig.head_dim = {self.head_dim}: rotary positions need an even head_dim")
        if self.head not in _HEADS:
            raise InputError(f"ModelConfig.head = {self.head!r}: one of {', '.join(_HEADS)}")
        for name in ("param_dtype", "compute_dtype"):
            if getattr(self, name) not in _DTYPES:
                raise InputError(f"ModelConfig.{name} = {getattr(self, name)!r}: one of {', '.join(_DTYPES)}")

    @property
    def has_lm(self) -> bool:
        """Whether logits can be computed."""
        return self.head in ("lm", "lm+scalar")

    @property
    def has_scalar(self) -> bool:
        """Whether a scalar per token can be computed."""
        return self.head in ("scalar", "lm+scalar")

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of activations."""
        return jnp.dtype(self.compute_dtype)

    def replace(self, **changes: Any) -> ModelConfig:
        """A copy with some fields changed (and checked)."""
        return dataclasses.replace(self, **changes)

    def to_json(self) -> str:
        """The fields as indented JSON: what a run directory keeps as ``model.json``."""
        return json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = "model.json") -> ModelConfig:
        """The inverse of `to_json`; unknown or missing fields are an `InputError` that names them."""
        try:
            fields = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"{where}:{error.lineno}: not JSON ({error.msg})") from error
        if not isinstance(fields, dict):
            raise InputError(f"{where}: expected a JSON object with the fields of ModelConfig")
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(fields) - known):
            raise InputError(f"{where}: unknown fields {', '.join(unknown)}: written by another version?")
        try:
            return cls(**fields)
        except TypeError as error:
            raise InputError(f"{where}: {error}") from error

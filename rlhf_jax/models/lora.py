"""Low-rank adapters (Hu et al. 2021, LoRA): y = x W + scaling * dropout(x) A B, W frozen, A and B trained.

A tree of parameters with adapters is the model's own tree with ``lora_a`` and ``lora_b`` beside the ``kernel`` of each
adapted matrix. `split` divides it into the frozen base and the trained part: the adapters, and the whole scalar head of
a reward or value model (a randomly initialized head must be trained). So optimizer moments exist only for the trained
part, and the reference policy is the base without adapters.
"""

from __future__ import annotations

import dataclasses
import math
import re
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from rlhf_jax.errors import InputError
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.weights import Kernel
from rlhf_jax.types import LossFn, Params, Rng

TRAINED = ("lora_a", "lora_b")
DROPOUT_KEY = "dropout_key"
HEAD = "scalar_head"


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """The settings of adapters.

    rank: columns of A.
    alpha: the scaling is alpha / rank.
    rslora: the scaling is alpha / sqrt(rank) (Kalajdzievski 2023).
    dropout: on the inputs of A, in training.
    targets: a regular expression that the whole name of a matrix inside its layer must match, such as ``attention/query`` or
    ``mlp/down``. The default is every matrix of attention and feed-forward.
    base_dtype: "int8" stores the frozen matrices of the layers in int8 (`models.int8`); None keeps the dtype in which they were
    loaded.
    """

    rank: int = 16
    alpha: float = 32.0
    rslora: bool = False
    dropout: float = 0.0
    targets: str = "attention/.*|mlp/.*"
    base_dtype: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise InputError(f"LoraConfig.rank = {self.rank!r}: give a whole number >= 1")
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, int | float) or not 0 < self.alpha < math.inf:
            raise InputError(f"LoraConfig.alpha = {self.alpha!r}: give a positive number")
        if isinstance(self.dropout, bool) or not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise InputError(f"LoraConfig.dropout = {self.dropout!r}: give a number in [0, 1)")
        if not isinstance(self.rslora, bool):
            raise InputError(f"LoraConfig.rslora = {self.rslora!r}: give True or False")
        if self.base_dtype not in (None, "int8"):
            raise InputError(f"LoraConfig.base_dtype = {self.base_dtype!r}: give 'int8', or None for the base's own")
        try:
            re.compile(self.targets)
        except (re.error, TypeError) as error:
            raise InputError(f"LoraConfig.targets = {self.targets!r}: not a regular expression ({error})") from error

    @property
    def int8(self) -> bool:
        """Whether the frozen matrices are int8."""
        return self.base_dtype == "int8"

    @property
    def scaling(self) -> float:
        """The factor of A B."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def add_adapters(layers: nnx.Module, config: ModelConfig, lora: LoraConfig, rngs: nnx.Rngs, dropout: bool) -> list[str]:
    """Add A and B to every matrix of a stack of layers that ``lora.targets`` matches; return the names of all its matrices.

    A is uniform within 1 / sqrt(inputs), as in PEFT, B is 0: the first output equals the base's. dropout: add
    parameters for the keys that `with_dropout` sets.
    """
    names = []
    for path, module in nnx.iter_modules(layers):
        if not isinstance(module, Kernel):
            continue
        names.append("/".join(map(str, path)))
        if re.fullmatch(lora.targets, names[-1]):
            module.adapt(config, lora.rank, lora.scaling, lora.dropout if dropout else 0.0, rngs)
    return names


def check_lora_targets(lora: LoraConfig, names: set[str]) -> None:
    """Raise InputError when the regular expression matches none of the matrices."""
    if not any(re.fullmatch(lora.targets, name) for name in names):
        raise InputError(
            f"LoraConfig.targets = {lora.targets!r}: matches no matrix of the layers; there are {', '.join(sorted(names))}"
        )


def split(tree: Params, path: tuple[str, ...] = ()) -> tuple[Params, Params]:
    """Return the (frozen, trained) parts of a tree like the parameters, whatever its leaves."""
    frozen: Params = {}
    trained: Params = {}
    for name, below in tree.items():
        if name in TRAINED or (name == HEAD and not path):
            trained[name] = below
        elif isinstance(below, dict):
            parts = split(below, (*path, name))
            frozen[name] = parts[0]
            if parts[1]:
                trained[name] = parts[1]
        else:
            frozen[name] = below
    return frozen, trained


def combine(frozen: Params, trained: Params) -> Params:
    """Return the tree that `split` divided. Makes no copies."""
    combined: Params = dict(frozen)
    for name, below in trained.items():
        combined[name] = combine(frozen[name], below) if isinstance(below, dict) and name in frozen else below
    return combined


def adapted_kernels(params: Params, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Params]]:
    """Yield (path, parameters) of every adapted matrix."""
    for name in sorted(params):
        if name == "lora_a":
            yield "/".join(path), params
        elif isinstance(params[name], dict):
            yield from adapted_kernels(params[name], (*path, name))


def with_dropout(params: Params, rng: Rng) -> Params:
    """Return the tree with a dropout key for each adapted matrix of each layer; a key depends on (rng, path, layer) only."""
    out: Params = {name: dict(below) if isinstance(below, dict) else below for name, below in params.items()}
    for path, kernel in list(adapted_kernels(params)):
        keys = jax.random.split(jax.random.fold_in(rng, zlib.crc32(path.encode())), kernel["lora_a"].shape[0])
        out = combine(out, _nest(path, {DROPOUT_KEY: jax.random.key_data(keys)}))
    return out


def _nest(path: str, leaf: Params) -> Params:
    for name in reversed(path.split("/")):
        leaf = {name: leaf}
    return leaf


def whole(trained: Params, frozen: Params | None) -> Params:
    """Return the tree of ``trained`` combined with ``frozen["base"]``; ``trained`` itself when there is no base (full fine-tuning).

    Trees of several models ({"policy": ..., "value": ...} on both sides) work the same.
    """
    return combine(frozen["base"], trained) if frozen and "base" in frozen else trained


def on_adapters(loss: LossFn, lora: LoraConfig | None) -> LossFn:
    """Return a loss of whole parameter trees as a loss of (trained, frozen), see `whole`. lora: None = full fine-tuning."""

    def adapted(trained: Params, frozen: Params, batch: Any, rng: Rng) -> Any:
        params = whole(trained, frozen)
        if lora is not None and lora.dropout:
            rng, drop_rng = jax.random.split(rng)
            params = with_dropout(params, drop_rng)
        return loss(params, frozen, batch, rng)

    return adapted


def merge(params: Params, lora: LoraConfig) -> Params:
    """Return the parameters of the equivalent model without adapters: W + scaling A B.

    Summed in float32 and rounded to W's dtype.
    """
    merged: Params = {}
    for name, below in params.items():
        if not isinstance(below, dict):
            merged[name] = below
        elif "lora_a" in below:
            merged[name] = {key: leaf for key, leaf in below.items() if key not in TRAINED}
            merged[name]["kernel"] = _merge_kernel(below["kernel"], below["lora_a"], below["lora_b"], lora.scaling)
        else:
            merged[name] = merge(below, lora)
    return merged


def _merge_kernel(kernel: Array, a: Array, b: Array, scaling: float) -> Array:
    """Return one merged stack of kernels.

    kernel: [L, inputs, outputs], a: [L, inputs, r], b: [L, r, outputs], where inputs and outputs are some axes each.
    """
    layers, rank = a.shape[0], a.shape[-1]
    a32 = a.astype(jnp.float32).reshape(layers, -1, rank)
    b32 = b.astype(jnp.float32).reshape(layers, rank, -1)
    change = scaling * jnp.einsum("lir,lro->lio", a32, b32, precision="highest")
    return (kernel.astype(jnp.float32) + change.reshape(kernel.shape)).astype(kernel.dtype)

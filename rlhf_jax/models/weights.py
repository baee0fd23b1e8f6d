"""Weight matrices and arithmetic that all layers share."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array

from rlhf_jax.models.config import ModelConfig


def precision_of(config: ModelConfig) -> jax.lax.Precision | None:
    """Return the precision of products: highest for float32 models (a TPU would otherwise use one bfloat16 pass)."""
    return jax.lax.Precision.HIGHEST if config.compute_dtype == "float32" else None


def soft_cap(x: Array, cap: float | None) -> Array:
    """Return cap * tanh(x / cap), within (-cap, cap) (Bello et al. 2016); ``x`` itself without a cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def random_matrix(config: ModelConfig, shape: tuple[int, ...], fan_in: int, rngs: nnx.Rngs) -> Array:
    """Return samples of N(0, 1/fan_in) truncated at two sigma, in param_dtype."""
    draw = jax.random.truncated_normal(rngs.params(), -2.0, 2.0, shape, jnp.float32) / math.sqrt(fan_in)
    return draw.astype(config.param_dtype)


def weights_first(
    equation: str,
    rows: Array,
    turned: Array,
    *,
    inputs: int,
    precision: jax.lax.Precision | None,
    result: DTypeLike | None = None,
) -> Array:
    """Compute ``equation`` of [n, inputs] and [inputs, outputs] with the weights stored as [outputs, inputs].

    The weights are the left operand: a CPU streams its rows once, whereas as the right operand it packs all of them
    again for 16 rows of text (1.5 to 2 times the time). The barrier keeps XLA from reversing the operands.
    """
    operands, out = equation.split("->")
    row, weight = operands.split(",")
    first = f"{weight[inputs:]}{weight[:inputs]},{row}->{out[1:]}{out[0]}"
    product = jnp.einsum(first, turned, rows, precision=precision, preferred_element_type=result)
    return jnp.moveaxis(jax.lax.optimization_barrier(product), -1, 0)


class Matrix(nnx.Param[Any]):
    """A parameter that multiplies or is looked up, one per layer or per expert.

    Weight decay applies to it, but not to biases and scales of norms. `Model.matrices` identifies these parameters by
    this type.
    """


class Kernel(nnx.Module):
    """A weight matrix (`random_matrix`) with an optional bias (zeros), applied by an einsum over rows (``n`` = B * S).

    inputs: how many leading axes are contracted.
    Rows instead of [B, S]: the gradient of the weights then contracts over one dimension. Over two, XLA on a CPU writes
    a transposed copy of the activations first, which doubles the backward pass of a small model. On a mesh that splits
    columns the two dimensions stay separate (`keep_columns`): rows of a merged array could not have the sharding of the
    columns, and every product would gather them.
    """

    def __init__(
        self,
        config: ModelConfig,
        shape: tuple[int, ...],
        axes: tuple[str, ...],
        *,
        inputs: int = 1,
        bias: bool = False,
        rngs: nnx.Rngs,
    ):
        self.kernel = Matrix(random_matrix(config, shape, math.prod(shape[:inputs]), rngs), sharding_names=axes)
        if bias:
            self.bias = nnx.Param(jnp.zeros(shape[inputs:], config.param_dtype), sharding_names=axes[inputs:])
        self._bias, self._dtype, self._precision = bias, config.dtype, precision_of(config)
        self._inputs, self._axes, self._adapted, self._turned, self._int8 = inputs, axes, False, False, False
        self._columns_apart = False

    def quantize(self) -> None:
        """Replace a stack of matrices [L, ...] by int8 with a scale per output (`models.int8`); the values are set later."""
        outs = self.kernel.shape[1 + self._inputs :]
        self.kernel_scale = nnx.Param(
            jnp.ones((self.kernel.shape[0], *outs), jnp.float32), sharding_names=("layers", *self._axes[self._inputs :])
        )
        self.kernel = Matrix(jnp.zeros(self.kernel.shape, jnp.int8), sharding_names=("layers", *self._axes))
        self._int8 = True

    def adapt(self, config: ModelConfig, rank: int, scaling: float, dropout: float, rngs: nnx.Rngs) -> None:
        """Add A and B of `models.lora` to a stack of matrices [L, ...]; with dropout also a parameter for a key per layer."""
        shape, at = self.kernel.shape, 1 + self._inputs
        bound = math.prod(shape[1:at]) ** -0.5
        draw = jax.random.uniform(rngs.params(), (*shape[:at], rank), jnp.float32, -bound, bound)
        zeros = jnp.zeros((shape[0], rank, *shape[at:]), config.param_dtype)
        ins, outs = self._axes[: self._inputs], self._axes[self._inputs :]
        self.lora_a = Matrix(draw.astype(config.param_dtype), sharding_names=("layers", *ins, "lora_rank"))
        self.lora_b = Matrix(zeros, sharding_names=("layers", "lora_rank", *outs))
        if dropout:
            self.dropout_key = nnx.Param(jnp.zeros((shape[0], 2), jnp.uint32), sharding_names=("layers", "lora_rank"))
        self._adapted, self._scaling, self._dropout = True, scaling, dropout

    def transpose_kernel(self) -> None:
        """Transpose the weights to [outputs, inputs], for products with few rows on a CPU (see `weights_first`)."""
        kernel = self.kernel[...].astype(self._dtype)
        self.kernel = Matrix(kernel.transpose(*range(self._inputs, kernel.ndim), *range(self._inputs)))
        self._turned = True

    def keep_columns(self) -> None:
        """Multiply [B, S, ...] without merging rows and columns."""
        self._columns_apart = True

    def __call__(self, equation: str, x: Array) -> Array:
        """Apply the matrix to x: [B, S, ...]; the equation is written for [n, ...]."""
        rows, kernel = x.reshape(-1, *x.shape[2:]), self.kernel[...].astype(self._dtype)
        if self._columns_apart and not self._turned:
            rows, equation = x, equation.replace("n", "bs")
        if self._turned:
            out = weights_first(equation, rows, kernel, inputs=self._inputs, precision=self._precision)
        else:
            out = jnp.einsum(equation, rows, kernel, precision=self._precision)
        if self._int8:
            out = (out.astype(jnp.float32) * self.kernel_scale[...]).astype(self._dtype)
        if self._adapted:
            out = out + self._low_rank(equation, rows)
        if self._bias:
            out = out + self.bias[...].astype(self._dtype)
        return out if rows is x else out.reshape(*x.shape[:2], *out.shape[1:])

    def _low_rank(self, equation: str, rows: Array) -> Array:
        """Return scaling * dropout(rows) A B; "nd,dhk->nhk" becomes "nd,dr->nr" and "nr,rhk->nhk"."""
        input_axes, joined = equation.split(",")
        weight, out = joined.split("->")
        if self._dropout:
            key = jax.random.wrap_key_data(self.dropout_key[...], impl="threefry2x32")
            keep = jax.random.bernoulli(key, 1.0 - self._dropout, rows.shape)
            rows = jnp.where(keep, rows / (1.0 - self._dropout), 0).astype(rows.dtype)
        a, b = self.lora_a[...].astype(self._dtype), self.lora_b[...].astype(self._dtype)
        row = "bs" if input_axes.startswith("bs") else "n"
        few = jnp.einsum(f"{input_axes},{weight[: self._inputs]}r->{row}r", rows, a, precision=self._precision)
        return self._scaling * jnp.einsum(f"{row}r,r{weight[self._inputs :]}->{out}", few, b, precision=self._precision)

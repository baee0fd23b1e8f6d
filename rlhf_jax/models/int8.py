"""Weight-only int8: a matrix W as int8 numbers Q and one float32 scale s per output, W = Q s.

s = max |W| / 127 over the inputs of an output, Q = W / s rounded to nearest even: every number is off by at most s / 2.
``x W`` is then ``(x Q) s``: the scale is applied after the product, so no float copy of a stack is made. Only matrices
of the layers are quantised, and only frozen ones (`LoraConfig.base_dtype`); embeddings, norms, biases and heads are not
quantised.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from rlhf_jax.types import Params

SCALE = "kernel_scale"


def quantize(kernel: Array, inputs: int) -> tuple[Int8[Array, "..."], Float[Array, "..."]]:
    """Return Q and s [L, outputs] of a stack of matrices [L, inputs, outputs].

    inputs: the number of axes that are inputs. Outputs that are all zero have s = 1.
    [[1, -8], [0.5, 4]] -> Q [[127, -127], [64, 64]], s [1/127, 8/127].
    """
    exact = kernel.astype(jnp.float32)
    over = tuple(range(1, 1 + inputs))
    largest = jnp.abs(exact).max(axis=over, keepdims=True)
    scale = jnp.where(largest > 0, largest / 127.0, 1.0)
    return jnp.clip(jnp.round(exact / scale), -127, 127).astype(jnp.int8), scale.squeeze(over)


def dequantize(quantized: Int8[Array, "..."], scale: Float[Array, "..."], dtype: Any) -> Array:
    """Return Q s in ``dtype``."""
    inputs = quantized.ndim - scale.ndim
    wide = scale.reshape(scale.shape[0], *(1,) * inputs, *scale.shape[1:])
    return (quantized.astype(jnp.float32) * wide).astype(dtype)


@functools.partial(jax.jit, static_argnums=1)
def _round_kernel(kernel: Array, inputs: int) -> Array:
    return dequantize(*quantize(kernel, inputs), kernel.dtype)


def quantized_tree(params: Params, like: Params, shardings: Params | None = None) -> Params:
    """Return ``params`` with the int8 matrices of ``like`` quantised, one after the other.

    like: `Model.abstract` of a model with ``int8``. shardings: of the result, a tree like ``like``.
    """

    def replace(leaf: Array, inputs: int, at: Params | None) -> Params:
        out_shardings = None if at is None else (at["kernel"], at[SCALE])
        return dict(
            zip(
                ("kernel", SCALE),
                jax.jit(quantize, static_argnums=1, out_shardings=out_shardings)(leaf, inputs),
                strict=True,
            )
        )

    return _map_matrices(params, like, replace, shardings)


def rounded_tree(params: Params, like: Params) -> Params:
    """Return ``params`` with those matrices quantised and dequantised again, in their own dtype."""
    return _map_matrices(params, like, lambda leaf, inputs, _: {"kernel": _round_kernel(leaf, inputs)})


def _map_matrices(
    params: Params,
    like: Params,
    replace: Callable[[Array, int, Params | None], Params],
    shardings: Params | None = None,
) -> Params:
    replaced: Params = {}
    for name, below in params.items():
        at = None if shardings is None else shardings[name]
        if not isinstance(below, dict):
            replaced[name] = below
        elif SCALE in like[name]:
            inputs = like[name]["kernel"].ndim - like[name][SCALE].ndim
            replaced[name] = below | replace(below["kernel"], inputs, at)
        else:
            replaced[name] = _map_matrices(below, like[name], replace, at)
    return replaced

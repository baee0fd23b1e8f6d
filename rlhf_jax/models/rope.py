"""Rotary positions (Su et al. 2021, RoFormer) and their scaling for longer contexts."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from rlhf_jax.errors import InputError

ScalingKind = Literal["linear", "llama3", "yarn", "longrope"]
_KINDS = ("linear", "llama3", "yarn", "longrope")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """The change of the rotary frequencies f of the original context for a longer one.

    kind: "linear", f / factor (Chen et al. 2023, position interpolation); "llama3", long wavelengths divided by factor, short
    ones unchanged, those between blended (reference code of Llama 3.1); "yarn", blended between two dimensions (Peng et al.
    2023, section 3.2); "longrope", each frequency divided by a number of its own (Ding et al. 2024).
    factor: of "linear", "llama3" and "yarn".
    original_max_length: tokens of the original context.
    low_frequency_factor: "llama3" divides wavelengths above original_max_length / low_frequency_factor.
    high_frequency_factor: "llama3" keeps wavelengths below original_max_length / high_frequency_factor.
    beta_fast: "yarn" keeps dimensions that rotate more often in the original context.
    beta_slow: "yarn" divides dimensions that rotate less often in the original context.
    truncate: round the two dimensions of "yarn" outwards.
    attention_factor: multiplies sine and cosine ("yarn" and "longrope").
    short_factors: divisors of "longrope".
    long_factors: divisors of "longrope" in a model whose max_length exceeds original_max_length.
    """

    kind: ScalingKind
    factor: float = 1.0
    original_max_length: int = 0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise InputError(f"RopeScaling.kind = {self.kind!r}: one of {', '.join(_KINDS)}")
        for name in ("short_factors", "long_factors"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON and gin give lists
        numbers = ["factor", "low_frequency_factor", "high_frequency_factor", "beta_fast", "beta_slow"]
        for name in [*numbers, "attention_factor"]:
            _check_positive(f"RopeScaling.{name}", getattr(self, name))
        for name in ("short_factors", "long_factors"):
            for value in getattr(self, name):
                _check_positive(f"RopeScaling.{name}", value)
        if not isinstance(self.truncate, bool):
            raise InputError(f"RopeScaling.truncate = {self.truncate!r}: give True or False")
        length = self.original_max_length
        if isinstance(length, bool) or not isinstance(length, int) or length < (self.kind != "linear"):
            raise InputError(f"RopeScaling.original_max_length = {length!r}: give the original context in tokens")
        if self.kind == "llama3" and self.low_frequency_factor >= self.high_frequency_factor:
            raise InputError(
                f"RopeScaling.low_frequency_factor = {self.low_frequency_factor}: must be below high_frequency_factor = "
                f"{self.high_frequency_factor}"
            )


@dataclasses.dataclass(frozen=True)
class Rope:
    """The rotary positions of one layer.

    size: number (even) of a head's dimensions that are rotated, the first ones. long: "longrope" uses the long factors.
    """

    theta: float
    size: int
    scaling: RopeScaling | None = None
    long: bool = False


def rotary(x: Float[Array, "B S H K"], positions: Int32[Array, "B S"], rope: Rope) -> Float[Array, "B S H K"]:
    """Rotate the first ``rope.size`` dimensions of ``x`` by its positions (RoFormer, eq. 34).

    The first half is paired with the second half as in Llama. Angles, sines and the rotation are float32 whatever the
    dtype of ``x``: bfloat16 cannot distinguish positions 257 and 256. Returns the dtype of ``x``.
    """
    rotated, unrotated = x[..., : rope.size], x[..., rope.size :]
    angles = positions.astype(jnp.float32)[..., None, None] * inverse_frequencies(rope)  # [B, S, 1, size/2]
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    if rope.scaling is not None and rope.scaling.attention_factor != 1.0:
        sin, cos = sin * rope.scaling.attention_factor, cos * rope.scaling.attention_factor
    first, second = jnp.split(rotated.astype(jnp.float32), 2, axis=-1)
    out = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    return out if rope.size == x.shape[-1] else jnp.concatenate([out, unrotated], axis=-1)


def inverse_frequencies(rope: Rope) -> Array:
    """Return radians per position of each pair, float32 [size / 2], computed on the host.

    1 / theta^(2 i / size), rounded to float32 after each step as in the reference implementations: a different rounding
    of one frequency is 3e-4 radians at position 5000. The power is taken in float64, because float32 powers of XLA on a
    CPU and of numpy with AVX-512 are off by more than a rounding.
    """
    exponents = np.arange(0, rope.size, 2, dtype=np.float32) / np.float32(rope.size)
    powers = np.power(float(np.float32(rope.theta)), exponents.astype(np.float64)).astype(np.float32)
    plain = np.float32(1) / powers
    if rope.scaling is None:
        return jnp.asarray(plain)
    return jnp.asarray(_scale_frequencies(plain.astype(np.float64), rope, rope.scaling), jnp.float32)


def _scale_frequencies(plain: np.ndarray, rope: Rope, scaling: RopeScaling) -> Any:
    """Return the frequencies ``plain`` changed by ``scaling``, in float64."""
    if scaling.kind == "linear":
        return plain / scaling.factor
    if scaling.kind == "longrope":
        return plain / np.asarray(scaling.long_factors if rope.long else scaling.short_factors)
    if scaling.kind == "llama3":
        turns = plain * scaling.original_max_length / (2 * math.pi)  # in the original context
        low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
        unscaled = np.clip((turns - low) / (high - low), 0, 1)  # 1: unchanged, 0: divided by the factor
        return plain * (unscaled + (1 - unscaled) / scaling.factor)
    low_dim, high_dim = (_yarn_dimension(rope, scaling, turns) for turns in (scaling.beta_fast, scaling.beta_slow))
    if scaling.truncate:
        low_dim, high_dim = math.floor(low_dim), math.ceil(high_dim)
    low_dim, high_dim = max(low_dim, 0), min(high_dim, rope.size - 1)
    width = high_dim - low_dim if high_dim != low_dim else 0.001  # as the reference does
    divided = np.clip((np.arange(len(plain)) - low_dim) / width, 0, 1)
    return plain * (1 - divided + divided / scaling.factor)


def _yarn_dimension(rope: Rope, scaling: RopeScaling, turns: float) -> float:
    """Return the (fractional) pair that rotates so many times in the original context."""
    pairs: float = (
        rope.size * math.log(scaling.original_max_length / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))
    )
    return pairs


def _check_positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise InputError(f"{name} = {value!r}: give a positive number")

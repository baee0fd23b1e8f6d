"""Checks of arguments that run when a function is traced: shapes, dtypes and plain numbers, never values of arrays.

NumPy's rules would make something of nearly everything: scores [B, 1] beside a mask [B, T] become [B, B, T], a mask of
shares counts what it scales, and a key of another generator draws other bits.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.errors import InputError


def require_same_shape(function: str, **arrays: Any) -> None:
    """Check that all arrays, given by argument name, have one shape. Raises InputError otherwise."""
    shapes = {name: jnp.shape(array) for name, array in arrays.items()}
    if len(set(shapes.values())) > 1:
        listed = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        raise InputError(f"{function}: {listed}: give equal shapes")


def require_rows(function: str, columns: Any, **arrays: Any) -> None:
    """Check that every array has one number for each row of ``columns`` [..., N]. Raises InputError otherwise."""
    for name, array in arrays.items():
        shape, rows = list(jnp.shape(array)), list(jnp.shape(columns)[:-1])
        if shape != rows:
            raise InputError(f"{function}: {name} {shape} beside {[*rows, jnp.shape(columns)[-1]]}: give shape {rows}")


def require_mask(function: str, **masks: Any) -> None:
    """Check that a mask is boolean: a fraction would be a weight, which masks are not. Raises InputError otherwise."""
    for name, mask in masks.items():
        if jnp.result_type(mask) != jnp.bool_:
            raise InputError(f"{function}: {name} of dtype {jnp.result_type(mask)}: give booleans, True = counts")


def require_ids(function: str, **arrays: Any) -> None:
    """Check that token ids or indices are whole numbers. Raises InputError otherwise."""
    for name, array in arrays.items():
        if not jnp.issubdtype(jnp.result_type(array), jnp.integer):
            raise InputError(f"{function}: {name} of dtype {jnp.result_type(array)}: give whole numbers")


def require_within(function: str, name: str, value: Any, low: float, high: float = float("inf")) -> None:
    """Check that a number is in [low, high] and not NaN; traced values pass. Raises InputError otherwise."""
    if isinstance(value, bool | str | None) or (isinstance(value, int | float) and not low <= value <= high):
        bounds = f">= {low}" if high == float("inf") else f"in [{low}, {high}]"
        raise InputError(f"{function}: {name} = {value!r}: give a number {bounds}")


def require_threefry(function: str, rng: Any) -> None:
    """Check that ``rng`` is a typed ``threefry2x32`` key or an array of such keys. Raises InputError otherwise.

    The bits of other generators depend on the batch and the mesh.
    """
    typed = hasattr(rng, "dtype") and jnp.issubdtype(rng.dtype, jax.dtypes.prng_key)
    if not typed or str(jax.random.key_impl(rng)) != "threefry2x32":
        raise InputError(f"{function}: give a key of jax.random.key(seed, impl='threefry2x32')")

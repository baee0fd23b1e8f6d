"""Rules of config.json for a single value: activations, attention scales, and fields that repeat another one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf_jax.errors import InputError
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.families.records import Fields, Rule

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def activation(name: str, default: str, functions: Mapping[str, str] = ACTIVATIONS) -> Rule:
    """Return the rule of the field ``name``; it is written in the family's own word for the function."""

    def read(fields: Fields, values: Fields, where: str) -> dict[str, Any]:
        value = fields.get(name, default)
        if not isinstance(value, str) or value not in functions:
            raise InputError(f"{where}: {name} = {value!r}: not implemented; known: {', '.join(functions)}")
        return {"activation": functions[value]}

    def write(config: ModelConfig) -> dict[str, Any]:
        words = [word for word, function in functions.items() if function == config.activation]
        return {name: default if default in words else words[-1]}

    return Rule(frozenset({name}), read, write)


def _query_scale(fields: Fields, values: Fields, where: str) -> dict[str, Any]:
    scalar = fields.get("query_pre_attn_scalar", 256)
    if isinstance(scalar, bool) or not isinstance(scalar, int | float) or scalar <= 0:
        raise InputError(f"{where}: query_pre_attn_scalar = {scalar!r}: must be a positive number")
    return {"attention_scale": scalar**-0.5}


def _query_scalar(config: ModelConfig) -> dict[str, Any]:
    scale = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
    exact = scale**-2
    return {"query_pre_attn_scalar": round(exact) if abs(exact - round(exact)) < 1e-6 * exact else exact}


def second_activation(name: str) -> Rule:
    """Return the rule of another field for the activation, which must mean the same. The field is never written.

    "gelu" may also mean its tanh approximation.
    """

    def read(fields: Fields, values: Fields, where: str) -> dict[str, Any]:
        value, computed = fields.get(name), values["activation"]
        function = ACTIVATIONS.get(value) if isinstance(value, str) else None
        if value is not None and computed != function and (value, computed) != ("gelu", "gelu_tanh"):
            raise InputError(
                f"{where}: {name} = {value!r}, but the activation is {computed!r}; let both fields say the same"
            )
        return {}

    return Rule(frozenset({name}), read, lambda config: {})


def second_number(name: str, first: str, default: int, unless: str | None = None) -> Rule:
    """Return the rule of another field for the number of ``first``, which must be equal unless ``unless`` is set.

    The field is never written.
    """

    def read(fields: Fields, values: Fields, where: str) -> dict[str, Any]:
        value, computed = fields.get(name), fields.get(first, default)
        if value is not None and value != computed and (unless is None or fields.get(unless) is None):
            raise InputError(f"{where}: {name} = {value!r}, but {first} is {computed!r}; let both fields say the same")
        return {}

    return Rule(frozenset({name}), read, lambda config: {})


def _gpt2_scale(fields: Fields, values: Fields, where: str) -> dict[str, Any]:
    scales = fields.get("scale_attn_weights", True)
    if not isinstance(scales, bool):
        raise InputError(f"{where}: scale_attn_weights = {scales!r}: must be true or false")
    return {"attention_scale": None if scales else 1.0}


QUERY_SCALE = Rule(frozenset({"query_pre_attn_scalar"}), _query_scale, _query_scalar)
GPT2_SCALE = Rule(
    frozenset({"scale_attn_weights"}),
    _gpt2_scale,
    lambda config: {"scale_attn_weights": config.attention_scale is None},
)

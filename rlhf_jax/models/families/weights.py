"""The rows of a family's table of tensor names for one model."""

from __future__ import annotations

import dataclasses
import functools

import jax

from rlhf_jax.errors import InputError
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.families.records import Family, Weight
from rlhf_jax.models.families.table import FAMILIES
from rlhf_jax.models.model import Model


def dimensions(config: ModelConfig) -> dict[str, int]:
    """Return the sizes of the letters of `Weight.layout`.

    v vocabulary, p positions, d hidden, h query heads, g key/value heads, k head_dim, f feed-forward, e experts, m
    width of an expert, o = 1.
    """
    return {
        "v": config.vocab_size,
        "p": config.max_length,
        "d": config.hidden_size,
        "h": config.num_heads,
        "g": config.num_kv_heads,
        "k": config.head_dim,
        "f": config.ffn_size,
        "e": config.num_experts,
        "m": config.expert_ffn_size,
        "o": 1,
    }


def family_of(config: ModelConfig) -> Family:
    """Return the record of ``config.family``. Raises InputError for an unknown name."""
    if config.family not in FAMILIES:
        raise InputError(f"ModelConfig.family = {config.family!r}: one of {', '.join(FAMILIES)}")
    return FAMILIES[config.family]


@functools.lru_cache(maxsize=64)
def weights_of(config: ModelConfig) -> tuple[Weight, ...]:
    """Return the rows of the family's table for this model: one for each of its parameters.

    ``parameter`` and ``layers`` describe the parameters as they are stacked. Raises InputError naming a parameter that
    checkpoints of the family have no tensor for.
    """
    leaves = jax.tree_util.tree_leaves_with_path(Model(config).abstract())
    present = {jax.tree_util.keystr(at, simple=True, separator="/") for at, _ in leaves}
    rows = []
    for weight in family_of(config).weights:
        stacks = config.layer_stacks() if "{layer}" in weight.tensor else (("", None),)
        for path, layers in stacks:
            parameter = weight.parameter if layers is None else path + weight.parameter.removeprefix("layers")
            if parameter in present:
                rows.append(dataclasses.replace(weight, parameter=parameter, layers=layers))
    if unnamed := sorted(present - {row.parameter for row in rows}):
        raise InputError(f"ModelConfig.family = {config.family!r}: its checkpoints have no tensor for {unnamed[0]}")
    return tuple(rows)

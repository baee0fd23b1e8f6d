"""The rows of a name table that one model has."""

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
    """The letters of `Weight.layout`: v vocabulary, p positions, d hidden, h query heads, g key/value heads, k head_dim,
    f feed-forward, e experts, m width of an expert, o = 1."""
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
    """The record of ``config.family``. Raises InputError for a name that is none."""
    if config.family not in FAMILIES:
        raise InputError(f"ModelConfig.family = {config.family!r}: one of {', '.join(FAMILIES)}")
    return FAMILIES[config.family]


@functools.lru_cache(maxsize=64)
def weights_of(config: ModelConfig) -> tuple[Weight, ...]:
    """The rows of the family's name table that this model has, one for each of its parameters, with ``ours`` and
    ``layers`` as the parameters are stacked.

    Raises InputError naming a parameter that checkpoints of the family have no tensor for.
    """
    leaves = jax.tree_util.tree_leaves_with_path(Model(config).abstract())
    present = {jax.tree_util.keystr(at, simple=True, separator="/") for at, _ in leaves}
    rows = []
    for weight in family_of(config).weights:
        stacks = config.layer_stacks() if "{layer}" in weight.theirs else (("", None),)
        for path, layers in stacks:
            ours = weight.ours if layers is None else path + weight.ours.removeprefix("layers")
            if ours in present:
                rows.append(dataclasses.replace(weight, ours=ours, layers=layers))
    if unnamed := sorted(present - {row.ours for row in rows}):
        raise InputError(f"ModelConfig.family = {config.family!r}: its checkpoints have no tensor for {unnamed[0]}")
    return tuple(rows)

"""Families of Hugging Face checkpoints, as data: what a config.json field means here, which tensor is which parameter.

A family is a `Family` record (`table.py`), not a class: the fields it maps, what it assumes of absent ones, the values
that the decoder can compute, and one table of names (`names.py`) that is read in both directions (`io` imports and
exports by it).
"""

from rlhf_jax.models.families.convert import ARCHITECTURES, config_from_hf, config_to_hf
from rlhf_jax.models.families.names import DERIVED_TENSORS
from rlhf_jax.models.families.records import Family, Weight
from rlhf_jax.models.families.table import FAMILIES
from rlhf_jax.models.families.weights import dimensions, weights_of

__all__ = [
    "ARCHITECTURES",
    "DERIVED_TENSORS",
    "FAMILIES",
    "Family",
    "Weight",
    "config_from_hf",
    "config_to_hf",
    "dimensions",
    "weights_of",
]

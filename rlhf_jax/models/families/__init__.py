"""Families of Hugging Face checkpoints, as data: the mapping of config.json fields and of tensor names.

A family is a `Family` record in a file of its own, not a class: the fields it maps, the defaults of absent fields, the
values that the decoder supports, and one table of tensor names that is read in both directions (`io` imports and
exports with it). `table.py` lists all; `shared.py` holds what several have in common.
"""

from rlhf_jax.models.families.convert import ARCHITECTURES, config_from_hf, config_to_hf
from rlhf_jax.models.families.records import Family, Weight
from rlhf_jax.models.families.shared import DERIVED_TENSORS
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

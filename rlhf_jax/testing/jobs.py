"""Jobs of algorithms over models that are in memory."""

from __future__ import annotations

from typing import Any

from jax.sharding import Mesh

from rlhf_jax.algorithms.build import ARRAYS, Setting
from rlhf_jax.algorithms.models import Loaded
from rlhf_jax.algorithms.roles import Roles
from rlhf_jax.data.trained_tokenizers import byte_tokenizer
from rlhf_jax.io.source import ModelSource
from rlhf_jax.models import Model
from rlhf_jax.types import Params

IN_MEMORY = ModelSource(path="in memory")
"""The source of a description whose models are given as they are."""


def loaded_model(model: Model, params: Params, tokenizer: Any = None) -> Loaded:
    """Return a model in memory as if it was loaded. tokenizer: None for bytes."""
    return Loaded(model, params, byte_tokenizer() if tokenizer is None else tokenizer, None)


def setting_of(mesh: Mesh, *, steps: int = 1, seed: int = 0) -> Setting:
    """Return where and how a test assembles a job."""
    return Setting.of(mesh, steps, seed, ARRAYS)


def roles_of(**models: tuple[Model, Params]) -> Roles:
    """Return models in memory by role: policy=(model, params), and value, reference, reward where there are such."""
    policy = loaded_model(*models["policy"])
    reward = loaded_model(*models["reward"]) if "reward" in models else None
    trainable: Params = {role: models[role][1] for role in ("policy", "value") if role in models}
    frozen: Params = {role: models[role][1] for role in ("reference", "reward") if role in models}
    return Roles(policy, reward, {role: model for role, (model, _) in models.items()}, trainable, frozen)

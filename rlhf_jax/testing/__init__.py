"""Fixtures for tests of this package and of its users: tiny models, small tokenizers, batches, toy rewards, simulated devices, and
the comparison of two runs.
"""

from __future__ import annotations

from rlhf_jax.data.trained_tokenizers import byte_tokenizer, train_bpe_tokenizer
from rlhf_jax.testing.batches import completions, prompt_batch, random_prompts, token_batch
from rlhf_jax.testing.devices import MESHES_OF_EIGHT, bytes_per_device, mesh_of, pretend_devices
from rlhf_jax.testing.jobs import IN_MEMORY, loaded_model, roles_of, setting_of
from rlhf_jax.testing.models import random_params, tiny_config, tiny_model
from rlhf_jax.testing.rewards import count_reward, table_reward
from rlhf_jax.testing.same_run import difference

__all__ = [
    "IN_MEMORY",
    "MESHES_OF_EIGHT",
    "byte_tokenizer",
    "bytes_per_device",
    "completions",
    "count_reward",
    "difference",
    "loaded_model",
    "mesh_of",
    "pretend_devices",
    "prompt_batch",
    "random_params",
    "random_prompts",
    "roles_of",
    "setting_of",
    "table_reward",
    "tiny_config",
    "tiny_model",
    "token_batch",
    "train_bpe_tokenizer",
]

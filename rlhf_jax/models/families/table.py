"""All families by `ModelConfig.family`, each a file of this package."""

from __future__ import annotations

from rlhf_jax.models.families.gemma import GEMMA
from rlhf_jax.models.families.gemma2 import GEMMA2
from rlhf_jax.models.families.gemma3 import GEMMA3
from rlhf_jax.models.families.gpt2 import GPT2
from rlhf_jax.models.families.gpt_neox import GPT_NEOX
from rlhf_jax.models.families.llama import LLAMA
from rlhf_jax.models.families.mistral import MISTRAL
from rlhf_jax.models.families.mixtral import MIXTRAL
from rlhf_jax.models.families.olmo2 import OLMO2
from rlhf_jax.models.families.phi3 import PHI3
from rlhf_jax.models.families.qwen2 import QWEN2
from rlhf_jax.models.families.qwen3 import QWEN3
from rlhf_jax.models.families.qwen3_moe import QWEN3_MOE
from rlhf_jax.models.families.records import Family
from rlhf_jax.models.families.smollm3 import SMOLLM3

FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3": GEMMA3,
    "smollm3": SMOLLM3,
    "phi3": PHI3,
    "olmo2": OLMO2,
    "gpt_neox": GPT_NEOX,
    "gpt2": GPT2,
    "mixtral": MIXTRAL,
    "qwen3_moe": QWEN3_MOE,
}
"""`ModelConfig.family` -> its record."""

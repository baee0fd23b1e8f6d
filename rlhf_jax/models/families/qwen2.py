"""Qwen 2: mapping of config.json to `ModelConfig`, and tensor names."""

from __future__ import annotations

from rlhf_jax.models.families.layer_fields import QWEN_LAYERS
from rlhf_jax.models.families.records import Family
from rlhf_jax.models.families.rope_fields import rope_rule
from rlhf_jax.models.families.shared import LLAMA_WEIGHTS, NO_DROPOUT, SIZES, defaults
from rlhf_jax.models.families.value_fields import activation

QWEN2 = Family(
    model_type="qwen2",
    language_model="Qwen2ForCausalLM",
    scorer="Qwen2ForSequenceClassification",
    fields=SIZES,
    defaults=defaults(32768, 32),
    implied={"qkv_bias": True},
    rules=(activation("hidden_act", "silu"), QWEN_LAYERS, rope_rule()),
    fixed=NO_DROPOUT | {"use_mrope": (False, None)},
    weights=LLAMA_WEIGHTS,
)

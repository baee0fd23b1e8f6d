"""Qwen 3: mapping of config.json to `ModelConfig`, and tensor names."""

from __future__ import annotations

from rlhf_jax.models.families.layer_fields import QWEN_LAYERS
from rlhf_jax.models.families.records import Family
from rlhf_jax.models.families.rope_fields import rope_rule
from rlhf_jax.models.families.shared import BIASES, LLAMA_WEIGHTS, NO_DROPOUT, SIZES, defaults
from rlhf_jax.models.families.value_fields import activation

QWEN3 = Family(
    model_type="qwen3",
    language_model="Qwen3ForCausalLM",
    scorer="Qwen3ForSequenceClassification",
    fields=SIZES | BIASES,
    defaults=defaults(32768, 32, 128),
    implied={"qk_norm": "head"},
    rules=(activation("hidden_act", "silu"), QWEN_LAYERS, rope_rule()),
    fixed=NO_DROPOUT,
    weights=LLAMA_WEIGHTS,
)

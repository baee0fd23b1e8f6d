"""Mistral: mapping of config.json to `ModelConfig`, and tensor names."""

from __future__ import annotations

from rlhf_jax.models.families.layer_fields import one_window
from rlhf_jax.models.families.records import Family
from rlhf_jax.models.families.rope_fields import rope_rule
from rlhf_jax.models.families.shared import LLAMA_WEIGHTS, NO_DROPOUT, SIZES, defaults
from rlhf_jax.models.families.value_fields import activation

MISTRAL = Family(
    model_type="mistral",
    language_model="MistralForCausalLM",
    scorer="MistralForSequenceClassification",
    fields=SIZES,
    defaults=defaults(4096 * 32, 8),
    rules=(activation("hidden_act", "silu"), one_window(4096), rope_rule()),
    # transformers' MistralConfig has none of these fields; in checkpoints that have them they mean the same as for Llama
    fixed=NO_DROPOUT | {"attention_bias": (False, None), "mlp_bias": (False, None), "pretraining_tp": (1, None)},
    weights=LLAMA_WEIGHTS,
)

"""Llama: mapping of config.json to `ModelConfig`, and tensor names."""

from __future__ import annotations

from rlhf_jax.models.families.records import Family
from rlhf_jax.models.families.rope_fields import rope_rule
from rlhf_jax.models.families.shared import BIASES, LLAMA_WEIGHTS, NO_DROPOUT, SIZES, defaults
from rlhf_jax.models.families.value_fields import activation

LLAMA = Family(
    model_type="llama",
    language_model="LlamaForCausalLM",
    scorer="LlamaForSequenceClassification",
    fields=SIZES | BIASES | {"mlp_bias": "mlp_bias"},
    defaults=defaults(2048, None),
    rules=(activation("hidden_act", "silu"), rope_rule()),
    fixed=NO_DROPOUT | {"pretraining_tp": (1, None), "rope_interleaved": (False, None)},
    weights=LLAMA_WEIGHTS,
    even_heads=True,
)

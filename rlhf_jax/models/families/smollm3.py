"""SmolLM3: mapping of config.json to `ModelConfig`, and tensor names."""

from __future__ import annotations

from rlhf_jax.models.families.layer_fields import SMOLLM3_LAYERS
from rlhf_jax.models.families.records import Family
from rlhf_jax.models.families.rope_fields import rope_rule
from rlhf_jax.models.families.shared import BIASES, LLAMA_WEIGHTS, NO_DROPOUT, SIZES, defaults
from rlhf_jax.models.families.value_fields import activation

SMOLLM3 = Family(
    model_type="smollm3",
    language_model="SmolLM3ForCausalLM",
    scorer="SmolLM3ForSequenceClassification",
    fields=SIZES | BIASES | {"mlp_bias": "mlp_bias"},
    defaults=defaults(32768, 4, tie_word_embeddings=True),
    rules=(activation("hidden_act", "silu"), SMOLLM3_LAYERS, rope_rule(2e6)),
    fixed=NO_DROPOUT,
    ignored=frozenset({"max_window_layers", "pretraining_tp"}),  # in the files, not in the model
    weights=LLAMA_WEIGHTS,
)

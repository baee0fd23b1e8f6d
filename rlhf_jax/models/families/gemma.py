"""Gemma: mapping of config.json to `ModelConfig`, and tensor names."""

from __future__ import annotations

from rlhf_jax.models.families.records import Family
from rlhf_jax.models.families.rope_fields import rope_rule
from rlhf_jax.models.families.shared import BIASES, GEMMA_FIXED, GEMMA_MODEL, LLAMA_WEIGHTS, SIZES, defaults
from rlhf_jax.models.families.value_fields import ACTIVATIONS, activation, second_activation

GEMMA = Family(
    model_type="gemma",
    language_model="GemmaForCausalLM",
    scorer="GemmaForSequenceClassification",
    fields=SIZES | BIASES,
    defaults=defaults(8192, 16, 256, tie_word_embeddings=True),
    implied=GEMMA_MODEL,
    # the first releases write "gelu" for its approximation, as in transformers
    rules=(
        activation("hidden_act", "gelu_pytorch_tanh", ACTIVATIONS | {"gelu": "gelu_tanh"}),
        second_activation("hidden_activation"),
        rope_rule(),
    ),
    fixed=GEMMA_FIXED,
    weights=LLAMA_WEIGHTS,
)

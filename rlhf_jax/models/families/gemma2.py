"""Gemma 2: mapping of config.json to `ModelConfig`, and tensor names."""

from __future__ import annotations

from rlhf_jax.models.families.layer_fields import alternating
from rlhf_jax.models.families.records import Family
from rlhf_jax.models.families.rope_fields import rope_rule
from rlhf_jax.models.families.shared import (
    GEMMA2_FIELDS,
    GEMMA2_RULES,
    GEMMA_FIXED,
    GEMMA_MODEL,
    GEMMA_WEIGHTS,
    defaults,
)
from rlhf_jax.models.families.value_fields import second_activation, second_number

GEMMA2 = Family(
    model_type="gemma2",
    language_model="Gemma2ForCausalLM",
    scorer="Gemma2ForSequenceClassification",
    fields=GEMMA2_FIELDS | {"attn_logit_softcapping": "attention_soft_cap"},
    defaults=defaults(
        8192, 4, 256, tie_word_embeddings=True, final_logit_softcapping=30.0, attn_logit_softcapping=50.0
    ),
    implied=GEMMA_MODEL | {"norm_placement": "both"},
    rules=(
        *GEMMA2_RULES,
        alternating(2),
        rope_rule(),
        second_activation("hidden_act"),  # the files have both fields
        second_number("sliding_window_size", "sliding_window", 4096),
    ),
    fixed=GEMMA_FIXED,
    weights=GEMMA_WEIGHTS,
    even_heads=True,
)

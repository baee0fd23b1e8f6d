"""Gemma 3 (text): mapping of config.json to `ModelConfig`, and tensor names."""

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
from rlhf_jax.models.families.value_fields import second_number

GEMMA3 = Family(
    model_type="gemma3_text",
    language_model="Gemma3ForCausalLM",
    scorer="Gemma3TextForSequenceClassification",
    fields=GEMMA2_FIELDS,
    defaults=defaults(131072, 4, 256, tie_word_embeddings=True, final_logit_softcapping=None),
    implied=GEMMA_MODEL | {"norm_placement": "both", "qk_norm": "head"},
    rules=(
        *GEMMA2_RULES,
        alternating(6, "sliding_window_pattern"),
        second_number("_sliding_window_pattern", "sliding_window_pattern", 6, unless="layer_types"),
        rope_rule(1e6, sliding_theta=10000.0),
    ),
    fixed=GEMMA_FIXED | {"attn_logit_softcapping": (None,)},
    weights=GEMMA_WEIGHTS,
    even_heads=True,
)

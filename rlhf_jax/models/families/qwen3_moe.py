"""Qwen 3 MoE: mapping of config.json to `ModelConfig`, and tensor names."""

from __future__ import annotations

from rlhf_jax.models.families.layer_fields import QWEN3_MOE_EXPERTS, one_window
from rlhf_jax.models.families.records import Family
from rlhf_jax.models.families.rope_fields import rope_rule
from rlhf_jax.models.families.shared import (
    BIASES,
    EXPERTS_IGNORED,
    LLAMA_WEIGHTS,
    NO_DROPOUT,
    ROUTER,
    SIZES,
    defaults,
    experts,
)
from rlhf_jax.models.families.value_fields import activation

QWEN3_MOE_WEIGHTS = (
    *LLAMA_WEIGHTS,
    *experts("mlp.gate", "mlp.experts", "gate_proj", "up_proj", "down_proj"),
)

QWEN3_MOE = Family(
    model_type="qwen3_moe",
    language_model="Qwen3MoeForCausalLM",
    scorer="Qwen3MoeForSequenceClassification",
    fields=SIZES
    | BIASES
    | ROUTER
    | {"moe_intermediate_size": "expert_ffn_size", "norm_topk_prob": "normalize_expert_weights"},
    defaults=defaults(
        32768,
        4,
        None,
        num_experts_per_tok=8,
        router_aux_loss_coef=0.001,
        moe_intermediate_size=768,
        norm_topk_prob=False,
    ),
    implied={"qk_norm": "head"},
    rules=(
        activation("hidden_act", "silu"),
        one_window(4096, "use_sliding_window"),
        QWEN3_MOE_EXPERTS,
        rope_rule(),
    ),
    fixed=NO_DROPOUT,
    ignored=EXPERTS_IGNORED | {"max_window_layers"},
    weights=QWEN3_MOE_WEIGHTS,
)

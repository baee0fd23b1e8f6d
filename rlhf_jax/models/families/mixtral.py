"""Mixtral: mapping of config.json to `ModelConfig`, and tensor names."""

from __future__ import annotations

from rlhf_jax.models.families.layer_fields import one_window
from rlhf_jax.models.families.records import Family
from rlhf_jax.models.families.rope_fields import rope_rule
from rlhf_jax.models.families.shared import (
    ATTENTION,
    ENDS,
    EXPERTS_IGNORED,
    NO_DROPOUT,
    PRE_NORMS,
    ROUTER,
    SIZES,
    defaults,
    experts,
)
from rlhf_jax.models.families.value_fields import activation

MIXTRAL_WEIGHTS = (
    *ENDS,
    *PRE_NORMS,
    *ATTENTION,
    *experts("block_sparse_moe.gate", "block_sparse_moe.experts", "w1", "w3", "w2"),
)

MIXTRAL = Family(
    model_type="mixtral",
    language_model="MixtralForCausalLM",
    scorer="MixtralForSequenceClassification",
    fields=SIZES | ROUTER | {"num_local_experts": "num_experts", "intermediate_size": ("ffn_size", "expert_ffn_size")},
    defaults=defaults(
        4096 * 32, 8, rms_norm_eps=1e-5, num_experts_per_tok=2, num_local_experts=8, router_aux_loss_coef=0.001
    ),
    rules=(activation("hidden_act", "silu"), one_window(None), rope_rule(1e6)),
    fixed=NO_DROPOUT | {"router_jitter_noise": (0, None)},
    ignored=EXPERTS_IGNORED,
    weights=MIXTRAL_WEIGHTS,
)

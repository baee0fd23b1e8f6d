"""Phi-3: mapping of config.json to `ModelConfig`, and tensor names."""

from __future__ import annotations

from rlhf_jax.models.families.layer_fields import one_window
from rlhf_jax.models.families.records import Family, Weight
from rlhf_jax.models.families.rope_fields import rope_rule
from rlhf_jax.models.families.shared import ENDS, LAYER, NO_DROPOUT, OUTPUT, PRE_NORMS, QKV, SIZES, defaults
from rlhf_jax.models.families.value_fields import activation

PHI3_WEIGHTS = (
    *ENDS,
    *PRE_NORMS,
    *(
        Weight(
            LAYER + "self_attn.qkv_proj.weight",
            f"layers/attention/{name}/kernel",
            f"(h k)|(g k)|(g k) d -> d {'h' if name == 'query' else 'g'} k",
            part,
        )
        for part, name in enumerate(QKV)
    ),
    *OUTPUT,
    Weight(LAYER + "mlp.gate_up_proj.weight", "layers/mlp/gate/kernel", "f|f d -> d f", 0),
    Weight(LAYER + "mlp.gate_up_proj.weight", "layers/mlp/up/kernel", "f|f d -> d f", 1),
    Weight(LAYER + "mlp.down_proj.weight", "layers/mlp/down/kernel", "d f -> f d"),
)

PHI3 = Family(
    model_type="phi3",
    language_model="Phi3ForCausalLM",
    scorer="Phi3ForSequenceClassification",
    fields=SIZES,
    defaults=defaults(4096, None, rms_norm_eps=1e-5),
    rules=(
        activation("hidden_act", "silu"),
        one_window(None),
        rope_rule(fraction="partial_rotary_factor", outer_original=True),
    ),
    fixed=NO_DROPOUT
    | {"resid_pdrop": (0, None), "embd_pdrop": (0, None), "attention_bias": (False, None), "mlp_bias": (False, None)}
    | {"lm_head_bias": (False, None), "full_attn_mod": (1, None), "interpolate_factor": (1, None)},
    ignored=frozenset({"auto_map"}),  # names Microsoft's code for old transformers; it is never run
    weights=PHI3_WEIGHTS,
)

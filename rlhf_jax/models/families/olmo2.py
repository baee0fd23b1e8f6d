"""OLMo 2: mapping of config.json to `ModelConfig`, and tensor names."""

from __future__ import annotations

from rlhf_jax.models.families.records import Family, Weight
from rlhf_jax.models.families.rope_fields import rope_rule
from rlhf_jax.models.families.shared import ATTENTION, BIASES, ENDS, LAYER, MLP, NO_DROPOUT, SIZES, defaults, norms
from rlhf_jax.models.families.value_fields import activation

_WIDTH_NORMS = (
    Weight(LAYER + "self_attn.q_norm.weight", "layers/attention/query_norm/scale", "(h k) -> h k"),
    Weight(LAYER + "self_attn.k_norm.weight", "layers/attention/key_norm/scale", "(g k) -> g k"),
)

OLMO2_WEIGHTS = (
    *ENDS,
    *norms(attention_post_norm="post_attention_layernorm", mlp_post_norm="post_feedforward_layernorm"),
    *ATTENTION,
    *_WIDTH_NORMS,
    *MLP,
)

OLMO2 = Family(
    model_type="olmo2",
    language_model="Olmo2ForCausalLM",
    scorer="Olmo2ForSequenceClassification",
    fields=SIZES | BIASES,
    defaults=defaults(2048, None, rms_norm_eps=1e-5),
    implied={"norm_placement": "post", "qk_norm": "width"},
    rules=(activation("hidden_act", "silu"), rope_rule()),
    fixed=NO_DROPOUT,
    weights=OLMO2_WEIGHTS,
)

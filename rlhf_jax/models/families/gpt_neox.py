"""GPT-NeoX: mapping of config.json to `ModelConfig`, and tensor names."""

from __future__ import annotations

from rlhf_jax.models.families.records import Family, Weight
from rlhf_jax.models.families.rope_fields import rope_rule
from rlhf_jax.models.families.shared import HEADS, LAYER_NORMS, NO_DROPOUT, QKV, with_bias
from rlhf_jax.models.families.value_fields import activation

_NEOX = "gpt_neox.layers.{layer}."

GPT_NEOX_WEIGHTS = (
    Weight("gpt_neox.embed_in.weight", "embed/embedding", "v d -> v d"),
    *with_bias(_NEOX + "input_layernorm", "layers/attention_norm"),
    *(
        Weight(_NEOX + f"attention.query_key_value.{kind}", f"layers/attention/{name}/{leaf}", layout, part)
        for part, name in enumerate(QKV)
        for kind, leaf, layout in (("weight", "kernel", "(h 3 k) d -> d h k"), ("bias", "bias", "(h 3 k) -> h k"))
    ),
    *with_bias(_NEOX + "attention.dense", "layers/attention/output", kernel="d (h k) -> h k d"),
    *with_bias(_NEOX + "post_attention_layernorm", "layers/mlp_norm"),
    *with_bias(_NEOX + "mlp.dense_h_to_4h", "layers/mlp/up", kernel="f d -> d f", bias="f -> f"),
    *with_bias(_NEOX + "mlp.dense_4h_to_h", "layers/mlp/down", kernel="d f -> f d"),
    *with_bias("gpt_neox.final_layer_norm", "final_norm"),
    Weight("embed_out.weight", "lm_head/kernel", "v d -> d v"),
    *HEADS[1:],
)

GPT_NEOX = Family(
    model_type="gpt_neox",
    language_model="GPTNeoXForCausalLM",
    scorer="GPTNeoXForSequenceClassification",
    fields={
        "vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "intermediate_size": "ffn_size",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "max_position_embeddings": "max_length",
        "layer_norm_eps": "norm_epsilon",
        "tie_word_embeddings": "tie_embeddings",
        "use_parallel_residual": "parallel_residual",
        "attention_bias": ("qkv_bias", "output_bias"),
    },
    defaults={
        "max_position_embeddings": 2048,
        "layer_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "use_parallel_residual": True,
        "attention_bias": True,
    },
    implied=LAYER_NORMS,
    rules=(
        activation("hidden_act", "gelu"),
        rope_rule(theta="rotary_emb_base", fraction="rotary_pct", default_fraction=0.25),
    ),
    fixed=NO_DROPOUT
    | dict.fromkeys(("hidden_dropout", "attention_probs_dropout_prob", "hidden_dropout_prob"), (0, None)),
    ignored=frozenset({"classifier_dropout"}),
    weights=GPT_NEOX_WEIGHTS,
    prefix="gpt_neox.",
    even_heads=True,
)

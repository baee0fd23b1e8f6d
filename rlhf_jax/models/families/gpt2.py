"""GPT-2: mapping of config.json to `ModelConfig`, and tensor names."""

from __future__ import annotations

from rlhf_jax.models.families.records import Family, Weight
from rlhf_jax.models.families.shared import HEADS, LAYER_NORMS, QKV, with_bias
from rlhf_jax.models.families.value_fields import GPT2_SCALE, activation

_GPT2 = "transformer.h.{layer}."

GPT2_WEIGHTS = (  # matrices are transposed (Conv1D)
    Weight("transformer.wte.weight", "embed/embedding", "v d -> v d"),
    Weight("transformer.wpe.weight", "position_embed/embedding", "p d -> p d"),
    *with_bias(_GPT2 + "ln_1", "layers/attention_norm"),
    *(
        Weight(_GPT2 + f"attn.c_attn.{kind}", f"layers/attention/{name}/{leaf}", layout, part)
        for part, name in enumerate(QKV)
        for kind, leaf, layout in (
            ("weight", "kernel", "d (h k)|(h k)|(h k) -> d h k"),
            ("bias", "bias", "(h k)|(h k)|(h k) -> h k"),
        )
    ),
    *with_bias(_GPT2 + "attn.c_proj", "layers/attention/output", kernel="(h k) d -> h k d"),
    *with_bias(_GPT2 + "ln_2", "layers/mlp_norm"),
    *with_bias(_GPT2 + "mlp.c_fc", "layers/mlp/up", kernel="d f -> d f", bias="f -> f"),
    *with_bias(_GPT2 + "mlp.c_proj", "layers/mlp/down", kernel="f d -> f d"),
    *with_bias("transformer.ln_f", "final_norm"),
    *HEADS,
)

GPT2 = Family(
    model_type="gpt2",
    language_model="GPT2LMHeadModel",
    scorer="GPT2ForSequenceClassification",
    fields={
        "vocab_size": "vocab_size",
        "n_embd": "hidden_size",
        "n_inner": "ffn_size",
        "n_layer": "num_layers",
        "n_head": "num_heads",
        "n_positions": "max_length",
        "layer_norm_epsilon": "norm_epsilon",
        "tie_word_embeddings": "tie_embeddings",
    },
    defaults={"n_inner": None, "n_positions": 1024, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
    implied=LAYER_NORMS | {"positions": "learned", "qkv_bias": True, "output_bias": True},
    rules=(activation("activation_function", "gelu_new"), GPT2_SCALE),
    fixed={"scale_attn_by_inverse_layer_idx": (False, None)},
    # dropout of the pre-training (0.1 in every file; training here uses none), the order of a product, heads of other tasks
    ignored=frozenset({"attn_pdrop", "embd_pdrop", "resid_pdrop", "n_ctx", "reorder_and_upcast_attn"})
    | {f"summary_{name}" for name in ("activation", "first_dropout", "proj_to_labels", "type", "use_proj")},
    weights=GPT2_WEIGHTS,
    prefix="transformer.",
    even_heads=True,
)

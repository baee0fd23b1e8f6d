"""THE table of families: what their config.json says in the words of `ModelConfig`."""

from __future__ import annotations

from typing import Any

from rlhf_jax.models.families import names
from rlhf_jax.models.families.layer_fields import (
    QWEN3_MOE_EXPERTS,
    QWEN_LAYERS,
    SMOLLM3_LAYERS,
    alternating,
    one_window,
)
from rlhf_jax.models.families.records import Family
from rlhf_jax.models.families.rope_fields import rope_rule
from rlhf_jax.models.families.value_fields import (
    ACTIVATIONS,
    GPT2_SCALE,
    QUERY_SCALE,
    activation,
    second_activation,
    second_number,
)

_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "max_position_embeddings": "max_length",
    "rms_norm_eps": "norm_epsilon",
    "tie_word_embeddings": "tie_embeddings",
}
_BIASES: dict[str, str | tuple[str, ...]] = {"attention_bias": ("qkv_bias", "output_bias")}
_NO_DROPOUT: dict[str, tuple[Any, ...]] = {"attention_dropout": (0, None)}


def _defaults(max_length: int, kv_heads: int | None, head_dim: int | None = None, **others: Any) -> dict[str, Any]:
    """What a config.json without the field means in transformers."""
    return {
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": max_length,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
    } | others


LLAMA = Family(
    model_type="llama",
    language_model="LlamaForCausalLM",
    scorer="LlamaForSequenceClassification",
    fields=_SIZES | _BIASES | {"mlp_bias": "mlp_bias"},
    defaults=_defaults(2048, None),
    rules=(activation("hidden_act", "silu"), rope_rule()),
    fixed=_NO_DROPOUT | {"pretraining_tp": (1, None), "rope_interleaved": (False, None)},
    weights=names.LLAMA_WEIGHTS,
    even_heads=True,
)
MISTRAL = Family(
    model_type="mistral",
    language_model="MistralForCausalLM",
    scorer="MistralForSequenceClassification",
    fields=_SIZES,
    defaults=_defaults(4096 * 32, 8),
    rules=(activation("hidden_act", "silu"), one_window(4096), rope_rule()),
    # transformers' MistralConfig knows none of these; checkpoints that have them mean Llama's
    fixed=_NO_DROPOUT | {"attention_bias": (False, None), "mlp_bias": (False, None), "pretraining_tp": (1, None)},
    weights=names.LLAMA_WEIGHTS,
)
QWEN2 = Family(
    model_type="qwen2",
    language_model="Qwen2ForCausalLM",
    scorer="Qwen2ForSequenceClassification",
    fields=_SIZES,
    defaults=_defaults(32768, 32),
    implied={"qkv_bias": True},
    rules=(activation("hidden_act", "silu"), QWEN_LAYERS, rope_rule()),
    fixed=_NO_DROPOUT | {"use_mrope": (False, None)},
    weights=names.LLAMA_WEIGHTS,
)
QWEN3 = Family(
    model_type="qwen3",
    language_model="Qwen3ForCausalLM",
    scorer="Qwen3ForSequenceClassification",
    fields=_SIZES | _BIASES,
    defaults=_defaults(32768, 32, 128),
    implied={"qk_norm": "head"},
    rules=(activation("hidden_act", "silu"), QWEN_LAYERS, rope_rule()),
    fixed=_NO_DROPOUT,
    weights=names.LLAMA_WEIGHTS,
)
_GEMMA = {"norm_offset": 1.0, "scale_embeddings": True}
_GEMMA_FIXED = _NO_DROPOUT | {"use_bidirectional_attention": (False, None)}
GEMMA = Family(
    model_type="gemma",
    language_model="GemmaForCausalLM",
    scorer="GemmaForSequenceClassification",
    fields=_SIZES | _BIASES,
    defaults=_defaults(8192, 16, 256, tie_word_embeddings=True),
    implied=_GEMMA,
    # the first releases say "gelu" and mean its approximation, as transformers knows
    rules=(
        activation("hidden_act", "gelu_pytorch_tanh", ACTIVATIONS | {"gelu": "gelu_tanh"}),
        second_activation("hidden_activation"),
        rope_rule(),
    ),
    fixed=_GEMMA_FIXED,
    weights=names.LLAMA_WEIGHTS,
)
_GEMMA2_FIELDS = _SIZES | _BIASES | {"final_logit_softcapping": "logit_soft_cap"}
_GEMMA2_RULES = (activation("hidden_activation", "gelu_pytorch_tanh"), QUERY_SCALE)
GEMMA2 = Family(
    model_type="gemma2",
    language_model="Gemma2ForCausalLM",
    scorer="Gemma2ForSequenceClassification",
    fields=_GEMMA2_FIELDS | {"attn_logit_softcapping": "attention_soft_cap"},
    defaults=_defaults(
        8192, 4, 256, tie_word_embeddings=True, final_logit_softcapping=30.0, attn_logit_softcapping=50.0
    ),
    implied=_GEMMA | {"norm_placement": "both"},
    rules=(
        *_GEMMA2_RULES,
        alternating(2),
        rope_rule(),
        second_activation("hidden_act"),  # the files have both words
        second_number("sliding_window_size", "sliding_window", 4096),
    ),
    fixed=_GEMMA_FIXED,
    weights=names.GEMMA_WEIGHTS,
    even_heads=True,
)
GEMMA3 = Family(
    model_type="gemma3_text",
    language_model="Gemma3ForCausalLM",
    scorer="Gemma3TextForSequenceClassification",
    fields=_GEMMA2_FIELDS,
    defaults=_defaults(131072, 4, 256, tie_word_embeddings=True, final_logit_softcapping=None),
    implied=_GEMMA | {"norm_placement": "both", "qk_norm": "head"},
    rules=(
        *_GEMMA2_RULES,
        alternating(6, "sliding_window_pattern"),
        second_number("_sliding_window_pattern", "sliding_window_pattern", 6, unless="layer_types"),
        rope_rule(1e6, sliding_theta=10000.0),
    ),
    fixed=_GEMMA_FIXED | {"attn_logit_softcapping": (None,)},
    weights=names.GEMMA_WEIGHTS,
    even_heads=True,
)
SMOLLM3 = Family(
    model_type="smollm3",
    language_model="SmolLM3ForCausalLM",
    scorer="SmolLM3ForSequenceClassification",
    fields=_SIZES | _BIASES | {"mlp_bias": "mlp_bias"},
    defaults=_defaults(32768, 4, tie_word_embeddings=True),
    rules=(activation("hidden_act", "silu"), SMOLLM3_LAYERS, rope_rule(2e6)),
    fixed=_NO_DROPOUT,
    ignored=frozenset({"max_window_layers", "pretraining_tp"}),  # in the files, not in the model
    weights=names.LLAMA_WEIGHTS,
)
PHI3 = Family(
    model_type="phi3",
    language_model="Phi3ForCausalLM",
    scorer="Phi3ForSequenceClassification",
    fields=_SIZES,
    defaults=_defaults(4096, None, rms_norm_eps=1e-5),
    rules=(
        activation("hidden_act", "silu"),
        one_window(None),
        rope_rule(fraction="partial_rotary_factor", outer_original=True),
    ),
    fixed=_NO_DROPOUT
    | {"resid_pdrop": (0, None), "embd_pdrop": (0, None), "attention_bias": (False, None), "mlp_bias": (False, None)}
    | {"lm_head_bias": (False, None), "full_attn_mod": (1, None), "interpolate_factor": (1, None)},
    ignored=frozenset({"auto_map"}),  # names Microsoft's code for old transformers; it is never run
    weights=names.PHI3_WEIGHTS,
)
OLMO2 = Family(
    model_type="olmo2",
    language_model="Olmo2ForCausalLM",
    scorer="Olmo2ForSequenceClassification",
    fields=_SIZES | _BIASES,
    defaults=_defaults(2048, None, rms_norm_eps=1e-5),
    implied={"norm_placement": "post", "qk_norm": "width"},
    rules=(activation("hidden_act", "silu"), rope_rule()),
    fixed=_NO_DROPOUT,
    weights=names.OLMO2_WEIGHTS,
)
_LAYER_NORMS = {"norm": "layer", "gated_mlp": False, "mlp_bias": True}
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
    implied=_LAYER_NORMS,
    rules=(
        activation("hidden_act", "gelu"),
        rope_rule(theta="rotary_emb_base", fraction="rotary_pct", default_fraction=0.25),
    ),
    fixed=_NO_DROPOUT
    | dict.fromkeys(("hidden_dropout", "attention_probs_dropout_prob", "hidden_dropout_prob"), (0, None)),
    ignored=frozenset({"classifier_dropout"}),
    weights=names.GPT_NEOX_WEIGHTS,
    prefix="gpt_neox.",
    even_heads=True,
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
    implied=_LAYER_NORMS | {"positions": "learned", "qkv_bias": True, "output_bias": True},
    rules=(activation("activation_function", "gelu_new"), GPT2_SCALE),
    fixed={"scale_attn_by_inverse_layer_idx": (False, None)},
    # dropout of the pre-training (0.1 in every file; training here uses none), the order of a product, heads of other tasks
    ignored=frozenset({"attn_pdrop", "embd_pdrop", "resid_pdrop", "n_ctx", "reorder_and_upcast_attn"})
    | {f"summary_{name}" for name in ("activation", "first_dropout", "proj_to_labels", "type", "use_proj")},
    weights=names.GPT2_WEIGHTS,
    prefix="transformer.",
    even_heads=True,
)
_ROUTER = {"num_experts_per_tok": "experts_per_token", "router_aux_loss_coef": "router_coefficient"}
_EXPERTS_IGNORED = frozenset({"output_router_logits"})  # what is returned; the loss is computed from the coefficient
MIXTRAL = Family(
    model_type="mixtral",
    language_model="MixtralForCausalLM",
    scorer="MixtralForSequenceClassification",
    fields=_SIZES
    | _ROUTER
    | {"num_local_experts": "num_experts", "intermediate_size": ("ffn_size", "expert_ffn_size")},
    defaults=_defaults(
        4096 * 32, 8, rms_norm_eps=1e-5, num_experts_per_tok=2, num_local_experts=8, router_aux_loss_coef=0.001
    ),
    rules=(activation("hidden_act", "silu"), one_window(None), rope_rule(1e6)),
    fixed=_NO_DROPOUT | {"router_jitter_noise": (0, None)},
    ignored=_EXPERTS_IGNORED,
    weights=names.MIXTRAL_WEIGHTS,
)
QWEN3_MOE = Family(
    model_type="qwen3_moe",
    language_model="Qwen3MoeForCausalLM",
    scorer="Qwen3MoeForSequenceClassification",
    fields=_SIZES
    | _BIASES
    | _ROUTER
    | {"moe_intermediate_size": "expert_ffn_size", "norm_topk_prob": "normalize_expert_weights"},
    defaults=_defaults(
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
    fixed=_NO_DROPOUT,
    ignored=_EXPERTS_IGNORED | {"max_window_layers"},
    weights=names.QWEN3_MOE_WEIGHTS,
)
FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3": GEMMA3,
    "smollm3": SMOLLM3,
    "phi3": PHI3,
    "olmo2": OLMO2,
    "gpt_neox": GPT_NEOX,
    "gpt2": GPT2,
    "mixtral": MIXTRAL,
    "qwen3_moe": QWEN3_MOE,
}
"""`ModelConfig.family` -> its record."""

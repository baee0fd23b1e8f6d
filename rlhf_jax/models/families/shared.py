"""Fields, tensor names and defaults that several families share."""

from __future__ import annotations

from typing import Any

from rlhf_jax.models.families.records import Weight
from rlhf_jax.models.families.value_fields import QUERY_SCALE, activation

DERIVED_TENSORS = (
    r"(model|gpt_neox)\.layers\.\d+\.(self_attn|attention)\.rotary_emb\.inv_freq"
    r"|gpt_neox\.layers\.\d+\.attention\.(masked_)?bias|transformer\.h\.\d+\.attn\.(masked_)?bias"
)
"""Buffers that old transformers stored (rotary frequencies, causal masks); they follow from the configuration."""

HEADS = (
    Weight("lm_head.weight", "lm_head/kernel", "v d -> d v"),
    Weight("score.weight", "scalar_head/kernel", "o d -> d o"),
    # transformers' score head has no bias. This bias is saved under this name; transformers reports it as unexpected and
    # computes the score without it.
    Weight("score.bias", "scalar_head/bias", "o -> o", zero_when_absent=True),
)

LAYER = "model.layers.{layer}."


def norms(**names: str) -> tuple[Weight, ...]:
    """Return the rows of a block's norms. names: parameter=tensor."""
    return tuple(
        Weight(f"{LAYER}{tensor}.weight", f"layers/{parameter}/scale", "d -> d") for parameter, tensor in names.items()
    )


ENDS = (
    Weight("model.embed_tokens.weight", "embed/embedding", "v d -> v d"),
    Weight("model.norm.weight", "final_norm/scale", "d -> d"),
    *HEADS,
)

OUTPUT = (
    Weight(LAYER + "self_attn.o_proj.weight", "layers/attention/output/kernel", "d (h k) -> h k d"),
    Weight(LAYER + "self_attn.o_proj.bias", "layers/attention/output/bias", "d -> d"),
)

ATTENTION = (
    Weight(LAYER + "self_attn.q_proj.weight", "layers/attention/query/kernel", "(h k) d -> d h k"),
    Weight(LAYER + "self_attn.k_proj.weight", "layers/attention/key/kernel", "(g k) d -> d g k"),
    Weight(LAYER + "self_attn.v_proj.weight", "layers/attention/value/kernel", "(g k) d -> d g k"),
    Weight(LAYER + "self_attn.q_proj.bias", "layers/attention/query/bias", "(h k) -> h k"),
    Weight(LAYER + "self_attn.k_proj.bias", "layers/attention/key/bias", "(g k) -> g k"),
    Weight(LAYER + "self_attn.v_proj.bias", "layers/attention/value/bias", "(g k) -> g k"),
    *OUTPUT,
)

HEAD_NORMS = (
    Weight(LAYER + "self_attn.q_norm.weight", "layers/attention/query_norm/scale", "k -> k"),
    Weight(LAYER + "self_attn.k_norm.weight", "layers/attention/key_norm/scale", "k -> k"),
)

MLP = (
    Weight(LAYER + "mlp.gate_proj.weight", "layers/mlp/gate/kernel", "f d -> d f"),
    Weight(LAYER + "mlp.up_proj.weight", "layers/mlp/up/kernel", "f d -> d f"),
    Weight(LAYER + "mlp.down_proj.weight", "layers/mlp/down/kernel", "d f -> f d"),
    Weight(LAYER + "mlp.gate_proj.bias", "layers/mlp/gate/bias", "f -> f"),
    Weight(LAYER + "mlp.up_proj.bias", "layers/mlp/up/bias", "f -> f"),
    Weight(LAYER + "mlp.down_proj.bias", "layers/mlp/down/bias", "d -> d"),
)


def experts(router: str, expert: str, gate: str, up: str, down: str) -> tuple[Weight, ...]:
    """Return the rows of a mixture of experts, given its tensor names."""
    return (
        Weight(f"{LAYER}{router}.weight", "layers/mlp/router", "e d -> d e"),
        Weight(f"{LAYER}{expert}.{{expert}}.{gate}.weight", "layers/mlp/gate", "m d -> d m"),
        Weight(f"{LAYER}{expert}.{{expert}}.{up}.weight", "layers/mlp/up", "m d -> d m"),
        Weight(f"{LAYER}{expert}.{{expert}}.{down}.weight", "layers/mlp/down", "d m -> m d"),
    )


PRE_NORMS = norms(attention_norm="input_layernorm", mlp_norm="post_attention_layernorm")

LLAMA_WEIGHTS = (*ENDS, *PRE_NORMS, *ATTENTION, *HEAD_NORMS, *MLP)

GEMMA_WEIGHTS = (
    *ENDS,
    *norms(
        attention_norm="input_layernorm",
        attention_post_norm="post_attention_layernorm",
        mlp_norm="pre_feedforward_layernorm",
        mlp_post_norm="post_feedforward_layernorm",
    ),
    *ATTENTION,
    *HEAD_NORMS,
    *MLP,
)

QKV = ("query", "key", "value")


def with_bias(
    tensor: str, parameter: str, *, kernel: str = "", bias: str = "d -> d", scale: str = "d -> d"
) -> tuple[Weight, ...]:
    """Return the rows of a tensor and its bias: of a matrix when ``kernel`` is given, else of a layer norm."""
    name, layout = ("kernel", kernel) if kernel else ("scale", scale)
    return (
        Weight(f"{tensor}.weight", f"{parameter}/{name}", layout),
        Weight(f"{tensor}.bias", f"{parameter}/bias", bias),
    )


SIZES = {
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

BIASES: dict[str, str | tuple[str, ...]] = {"attention_bias": ("qkv_bias", "output_bias")}

NO_DROPOUT: dict[str, tuple[Any, ...]] = {"attention_dropout": (0, None)}


def defaults(max_length: int, kv_heads: int | None, head_dim: int | None = None, **more: Any) -> dict[str, Any]:
    """Return the values that transformers assumes for absent fields of a config.json."""
    return {
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": max_length,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
    } | more


GEMMA_MODEL = {"norm_offset": 1.0, "scale_embeddings": True}

GEMMA_FIXED = NO_DROPOUT | {"use_bidirectional_attention": (False, None)}

GEMMA2_FIELDS = SIZES | BIASES | {"final_logit_softcapping": "logit_soft_cap"}

GEMMA2_RULES = (activation("hidden_activation", "gelu_pytorch_tanh"), QUERY_SCALE)

LAYER_NORMS = {"norm": "layer", "gated_mlp": False, "mlp_bias": True}

ROUTER = {"num_experts_per_tok": "experts_per_token", "router_aux_loss_coef": "router_coefficient"}

EXPERTS_IGNORED = frozenset({"output_router_logits"})  # what is returned; the loss is computed from the coefficient

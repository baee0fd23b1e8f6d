"""Name tables: which tensor of a checkpoint is which parameter."""

from __future__ import annotations

from rlhf_jax.models.families.records import Weight

DERIVED_TENSORS = (
    r"(model|gpt_neox)\.layers\.\d+\.(self_attn|attention)\.rotary_emb\.inv_freq"
    r"|gpt_neox\.layers\.\d+\.attention\.(masked_)?bias|transformer\.h\.\d+\.attn\.(masked_)?bias"
)
"""Buffers that old transformers stored (rotary frequencies, causal masks); they follow from the configuration."""

_HEADS = (
    Weight("lm_head.weight", "lm_head/kernel", "v d -> d v"),
    Weight("score.weight", "scalar_head/kernel", "o d -> d o"),
    # transformers' score head has no bias. Ours is kept under this name; transformers reports it as unexpected and
    # computes the score without it.
    Weight("score.bias", "scalar_head/bias", "o -> o", zero_when_absent=True),
)
_LAYER = "model.layers.{layer}."


def _norms(**names: str) -> tuple[Weight, ...]:
    """ours=theirs for the norms of a block."""
    return tuple(Weight(f"{_LAYER}{theirs}.weight", f"layers/{ours}/scale", "d -> d") for ours, theirs in names.items())


_ENDS = (
    Weight("model.embed_tokens.weight", "embed/embedding", "v d -> v d"),
    Weight("model.norm.weight", "final_norm/scale", "d -> d"),
    *_HEADS,
)
_OUTPUT = (
    Weight(_LAYER + "self_attn.o_proj.weight", "layers/attention/output/kernel", "d (h k) -> h k d"),
    Weight(_LAYER + "self_attn.o_proj.bias", "layers/attention/output/bias", "d -> d"),
)
_ATTENTION = (
    Weight(_LAYER + "self_attn.q_proj.weight", "layers/attention/query/kernel", "(h k) d -> d h k"),
    Weight(_LAYER + "self_attn.k_proj.weight", "layers/attention/key/kernel", "(g k) d -> d g k"),
    Weight(_LAYER + "self_attn.v_proj.weight", "layers/attention/value/kernel", "(g k) d -> d g k"),
    Weight(_LAYER + "self_attn.q_proj.bias", "layers/attention/query/bias", "(h k) -> h k"),
    Weight(_LAYER + "self_attn.k_proj.bias", "layers/attention/key/bias", "(g k) -> g k"),
    Weight(_LAYER + "self_attn.v_proj.bias", "layers/attention/value/bias", "(g k) -> g k"),
    *_OUTPUT,
)
_HEAD_NORMS = (
    Weight(_LAYER + "self_attn.q_norm.weight", "layers/attention/query_norm/scale", "k -> k"),
    Weight(_LAYER + "self_attn.k_norm.weight", "layers/attention/key_norm/scale", "k -> k"),
)
_WIDTH_NORMS = (
    Weight(_LAYER + "self_attn.q_norm.weight", "layers/attention/query_norm/scale", "(h k) -> h k"),
    Weight(_LAYER + "self_attn.k_norm.weight", "layers/attention/key_norm/scale", "(g k) -> g k"),
)
_MLP = (
    Weight(_LAYER + "mlp.gate_proj.weight", "layers/mlp/gate/kernel", "f d -> d f"),
    Weight(_LAYER + "mlp.up_proj.weight", "layers/mlp/up/kernel", "f d -> d f"),
    Weight(_LAYER + "mlp.down_proj.weight", "layers/mlp/down/kernel", "d f -> f d"),
    Weight(_LAYER + "mlp.gate_proj.bias", "layers/mlp/gate/bias", "f -> f"),
    Weight(_LAYER + "mlp.up_proj.bias", "layers/mlp/up/bias", "f -> f"),
    Weight(_LAYER + "mlp.down_proj.bias", "layers/mlp/down/bias", "d -> d"),
)


def _experts(router: str, expert: str, gate: str, up: str, down: str) -> tuple[Weight, ...]:
    return (
        Weight(f"{_LAYER}{router}.weight", "layers/mlp/router", "e d -> d e"),
        Weight(f"{_LAYER}{expert}.{{expert}}.{gate}.weight", "layers/mlp/gate", "m d -> d m"),
        Weight(f"{_LAYER}{expert}.{{expert}}.{up}.weight", "layers/mlp/up", "m d -> d m"),
        Weight(f"{_LAYER}{expert}.{{expert}}.{down}.weight", "layers/mlp/down", "d m -> m d"),
    )


_PRE_NORMS = _norms(attention_norm="input_layernorm", mlp_norm="post_attention_layernorm")
LLAMA_WEIGHTS = (*_ENDS, *_PRE_NORMS, *_ATTENTION, *_HEAD_NORMS, *_MLP)
GEMMA_WEIGHTS = (
    *_ENDS,
    *_norms(
        attention_norm="input_layernorm",
        attention_post_norm="post_attention_layernorm",
        mlp_norm="pre_feedforward_layernorm",
        mlp_post_norm="post_feedforward_layernorm",
    ),
    *_ATTENTION,
    *_HEAD_NORMS,
    *_MLP,
)
OLMO2_WEIGHTS = (
    *_ENDS,
    *_norms(attention_post_norm="post_attention_layernorm", mlp_post_norm="post_feedforward_layernorm"),
    *_ATTENTION,
    *_WIDTH_NORMS,
    *_MLP,
)
_QKV = ("query", "key", "value")
PHI3_WEIGHTS = (
    *_ENDS,
    *_PRE_NORMS,
    *(
        Weight(
            _LAYER + "self_attn.qkv_proj.weight",
            f"layers/attention/{name}/kernel",
            f"(h k)|(g k)|(g k) d -> d {'h' if name == 'query' else 'g'} k",
            part,
        )
        for part, name in enumerate(_QKV)
    ),
    *_OUTPUT,
    Weight(_LAYER + "mlp.gate_up_proj.weight", "layers/mlp/gate/kernel", "f|f d -> d f", 0),
    Weight(_LAYER + "mlp.gate_up_proj.weight", "layers/mlp/up/kernel", "f|f d -> d f", 1),
    Weight(_LAYER + "mlp.down_proj.weight", "layers/mlp/down/kernel", "d f -> f d"),
)
MIXTRAL_WEIGHTS = (
    *_ENDS,
    *_PRE_NORMS,
    *_ATTENTION,
    *_experts("block_sparse_moe.gate", "block_sparse_moe.experts", "w1", "w3", "w2"),
)
QWEN3_MOE_WEIGHTS = (
    *LLAMA_WEIGHTS,
    *_experts("mlp.gate", "mlp.experts", "gate_proj", "up_proj", "down_proj"),
)


def _both(
    theirs: str, ours: str, *, kernel: str = "", bias: str = "d -> d", scale: str = "d -> d"
) -> tuple[Weight, ...]:
    """A tensor and its bias: of a matrix when ``kernel`` is given, else of a layer norm."""
    name, layout = ("kernel", kernel) if kernel else ("scale", scale)
    return (Weight(f"{theirs}.weight", f"{ours}/{name}", layout), Weight(f"{theirs}.bias", f"{ours}/bias", bias))


_NEOX = "gpt_neox.layers.{layer}."
GPT_NEOX_WEIGHTS = (
    Weight("gpt_neox.embed_in.weight", "embed/embedding", "v d -> v d"),
    *_both(_NEOX + "input_layernorm", "layers/attention_norm"),
    *(
        Weight(_NEOX + f"attention.query_key_value.{kind}", f"layers/attention/{name}/{leaf}", layout, part)
        for part, name in enumerate(_QKV)
        for kind, leaf, layout in (("weight", "kernel", "(h 3 k) d -> d h k"), ("bias", "bias", "(h 3 k) -> h k"))
    ),
    *_both(_NEOX + "attention.dense", "layers/attention/output", kernel="d (h k) -> h k d"),
    *_both(_NEOX + "post_attention_layernorm", "layers/mlp_norm"),
    *_both(_NEOX + "mlp.dense_h_to_4h", "layers/mlp/up", kernel="f d -> d f", bias="f -> f"),
    *_both(_NEOX + "mlp.dense_4h_to_h", "layers/mlp/down", kernel="d f -> f d"),
    *_both("gpt_neox.final_layer_norm", "final_norm"),
    Weight("embed_out.weight", "lm_head/kernel", "v d -> d v"),
    *_HEADS[1:],
)
_GPT2 = "transformer.h.{layer}."
GPT2_WEIGHTS = (  # matrices lie transposed (Conv1D)
    Weight("transformer.wte.weight", "embed/embedding", "v d -> v d"),
    Weight("transformer.wpe.weight", "position_embed/embedding", "p d -> p d"),
    *_both(_GPT2 + "ln_1", "layers/attention_norm"),
    *(
        Weight(_GPT2 + f"attn.c_attn.{kind}", f"layers/attention/{name}/{leaf}", layout, part)
        for part, name in enumerate(_QKV)
        for kind, leaf, layout in (
            ("weight", "kernel", "d (h k)|(h k)|(h k) -> d h k"),
            ("bias", "bias", "(h k)|(h k)|(h k) -> h k"),
        )
    ),
    *_both(_GPT2 + "attn.c_proj", "layers/attention/output", kernel="(h k) d -> h k d"),
    *_both(_GPT2 + "ln_2", "layers/mlp_norm"),
    *_both(_GPT2 + "mlp.c_fc", "layers/mlp/up", kernel="d f -> d f", bias="f -> f"),
    *_both(_GPT2 + "mlp.c_proj", "layers/mlp/down", kernel="f d -> f d"),
    *_both("transformer.ln_f", "final_norm"),
    *_HEADS,
)

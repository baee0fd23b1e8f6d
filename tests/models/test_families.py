"""config.json fields and name tables of checkpoint families."""

from __future__ import annotations

import math
import re
from typing import Any

import jax
import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.io.layout import parse
from rlhf_jax.models import Head, Model, ModelConfig, RopeScaling
from rlhf_jax.models.families import config_from_hf, config_to_hf, dimensions, weights_of
from rlhf_jax.testing import tiny_config

V4 = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-05,
    "rope_theta": 5000.0,
    "rope_scaling": None,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "pretraining_tp": 1,
    "torch_dtype": "bfloat16",
    "initializer_range": 0.02,
    "use_cache": True,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "transformers_version": "4.46.0",
}
"""A config.json written by transformers 4."""
V5 = {name: value for name, value in V4.items() if name not in ("rope_theta", "rope_scaling", "torch_dtype")} | {
    "rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"},
    "dtype": "bfloat16",
}
"""A config.json written by transformers 5."""
EXPECTED = ModelConfig(
    vocab_size=300,
    hidden_size=32,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    ffn_size=48,
    max_length=64,
    rope_theta=5000.0,
    norm_epsilon=1e-5,
    tie_embeddings=True,
)


def config(fields: dict[str, Any]) -> ModelConfig:
    return config_from_hf(fields, "config.json")


@pytest.mark.parametrize("fields", [V4, V5])
def test_every_field_arrives(fields: dict[str, Any]) -> None:
    assert config(fields) == EXPECTED


@pytest.mark.parametrize(
    ("hf_field", "value", "field"),
    [
        ("vocab_size", 301, "vocab_size"),
        ("hidden_size", 64, "hidden_size"),
        ("intermediate_size", 49, "ffn_size"),
        ("num_hidden_layers", 1, "num_layers"),
        ("num_attention_heads", 8, "num_heads"),
        ("num_key_value_heads", 4, "num_kv_heads"),
        ("head_dim", 8, "head_dim"),
        ("max_position_embeddings", 8192, "max_length"),
        ("rms_norm_eps", 1e-6, "norm_epsilon"),
        ("rope_theta", 1e6, "rope_theta"),
        ("tie_word_embeddings", False, "tie_embeddings"),
    ],
)
def test_each_field_is_its_own(hf_field: str, value: Any, field: str) -> None:
    assert config(V4 | {hf_field: value}) == EXPECTED.replace(**{field: value})


def test_absent_fields_mean_what_transformers_assumes() -> None:
    """LlamaConfig: as many key/value heads as heads, head_dim by division, eps 1e-6, theta 10000, untied, 2048."""
    absent = ["num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "tie_word_embeddings"]
    absent += ["max_position_embeddings", "attention_bias", "mlp_bias", "hidden_act", "attention_dropout"]
    assert config({name: value for name, value in V4.items() if name not in absent}) == EXPECTED.replace(
        num_kv_heads=4, head_dim=8, norm_epsilon=1e-6, rope_theta=10000.0, tie_embeddings=False, max_length=2048
    )
    assert config(V4 | {"head_dim": None, "num_key_value_heads": None}).head_dim == 8


MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_act": "relu2"}, "hidden_act = 'relu2': not implemented; known: silu"),
        ({"attention_bias": "yes"}, "ModelConfig.qkv_bias = 'yes'"),
        ({"attention_dropout": 0.1}, "attention_dropout = 0.1"),
        ({"pretraining_tp": 2}, "pretraining_tp = 2"),
        ({"rope_interleaved": True}, "rope_interleaved = True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor, high_freq_factor is missing"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic.*not implemented; known: linear, llama3"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 3}}, "beta_fast.*not implemented"),
        ({"rope_scaling": {"type": "linear", "factor": -2.0}}, "rope_scaling: RopeScaling.factor = -2.0"),
        ({"rope_scaling": {"type": "yarn", "factor": "2"}}, "rope_scaling.factor = '2': must be a number"),
        ({"rope_parameters": {"rope_theta": 5000.0, "partial_rotary_factor": 0.5}}, "partial_rotary_factor.*not impl"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"type": "linear", "factor": 3.0}},
            "rope_scaling and rope_parameters disagree",
        ),
        ({"rope_parameters": {"rope_theta": 6000.0, "rope_type": "default"}}, "given as 5000.0 and as 6000.0"),
        ({"rope_scaling": 2}, "rope_scaling = 2"),
        (
            {"rope_scaling": {"type": "linear", "rope_type": "default"}},
            "type = 'linear', but rope_type = 'default'; keep",
        ),
        (
            {"rope_scaling": {"type": "yarn", "rope_type": "linear", "factor": 2.0}},
            "rope_scaling: type = 'yarn', but rope_type = 'linear'; keep one",
        ),
        ({"rope_theta": "big"}, "rope_theta = 'big'"),
        ({"attention_multiplier": 2.0, "logits_scaling": 8}, "unknown fields attention_multiplier, logits_scaling"),
        ({"sliding_window": 4096}, "unknown fields sliding_window"),
        ({"auto_map": {"AutoModel": "x.py"}}, "auto_map.*never run"),
        ({"architectures": ["FalconForCausalLM"]}, "architecture FalconForCausalLM is not supported; supported: Llama"),
        ({"model_type": "granite"}, "model_type = 'granite', but architectures names a model of type 'llama'; take"),
        ({"architectures": None}, "architectures = None"),
        ({"architectures": ["LlamaForCausalLM", "LlamaForSequenceClassification"]}, "name exactly one"),
        ({"hidden_size": "32"}, "ModelConfig.hidden_size = '32'"),
        ({"rms_norm_eps": None}, "ModelConfig.norm_epsilon = None"),
        ({"tie_word_embeddings": "no"}, "ModelConfig.tie_embeddings"),
        ({"head_dim": None, "num_attention_heads": 5}, "hidden_size = 32, num_attention_heads = 5: not a multiple"),
        (MISTRAL | {"sliding_window": 0}, "sliding_window = 0: must be a positive number of tokens"),
        (MISTRAL | {"attention_bias": True}, "attention_bias = True"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "with 2 labels"),  # absent: PretrainedConfig's default
        ({"architectures": ["LlamaForSequenceClassification"], "num_labels": 3}, "with 3 labels"),
    ],
)
def test_what_changes_the_computation_is_refused_by_name(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=f"^config.json: .*{words}") as caught:
        config(V4 | changes)
    assert "\n" not in str(caught.value)


def test_a_missing_size_is_named() -> None:
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        with pytest.raises(InputError, match=f"{name} is missing"):
            config({key: value for key, value in V4.items() if key != name})


def test_mistral_without_a_window_is_the_same_model() -> None:
    assert config(V4 | MISTRAL | {"sliding_window": None}) == EXPECTED.replace(family="mistral")
    absent = config(V4 | MISTRAL)  # MistralConfig's default
    assert absent.sliding_window == 4096 and absent.layer_pattern == ("sliding",)


def read(architecture: str, **fields: Any) -> ModelConfig:
    """Read a config.json of that architecture with V4's sizes."""
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    heads = {} if architecture.startswith("GPTNeoX") else {"num_key_value_heads": 2}
    return config({name: V4[name] for name in sizes} | heads | {"architectures": [architecture]} | fields)


LONG = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


def test_layers_by_hand() -> None:
    """What each family assumes of its layers, and what says otherwise."""
    qwen = read("Qwen2ForCausalLM", use_sliding_window=True, sliding_window=9, max_window_layers=1)
    assert (qwen.layer_pattern, qwen.sliding_window) == (("full", "sliding", "sliding"), 9)
    qwen = read("Qwen2ForCausalLM", sliding_window=9, max_window_layers=1)
    assert (qwen.layer_pattern, qwen.sliding_window) == ((), None)
    gemma2 = read("Gemma2ForCausalLM", num_hidden_layers=6)
    assert (gemma2.layer_pattern, gemma2.sliding_window) == (("sliding", "full"), 4096)
    gemma3 = read("Gemma3ForCausalLM", num_hidden_layers=26)
    assert gemma3.layer_pattern == ("sliding",) * 5 + ("full",)
    assert [(len(group.kinds), group.repeats) for group in gemma3.layer_groups()] == [(6, 4), (2, 1)]
    assert (gemma3.rope_theta, gemma3.rope_theta_sliding) == (1e6, 1e4)
    smol = read("SmolLM3ForCausalLM", num_hidden_layers=8, use_sliding_window=True, sliding_window=5)
    assert smol.layer_pattern == ("full", "full", "full", "sliding_nope") and smol.rope_theta == 2e6
    assert read("SmolLM3ForCausalLM", num_hidden_layers=8).layer_pattern == ("full", "full", "full", "full_nope")
    moe = read("Qwen3MoeForCausalLM", num_hidden_layers=6, decoder_sparse_step=2, mlp_only_layers=[3])
    assert moe.dense_layers == (0, 2, 3, 4) and moe.num_experts == 128


def test_scalings_by_hand() -> None:
    """What is absent in rope_scaling, as transformers fills it in."""
    yarn = read("Qwen2ForCausalLM", rope_scaling={"type": "yarn", "factor": 4.0}, max_position_embeddings=512)
    assert yarn.rope_scaling == RopeScaling("yarn", 4.0, 512, attention_factor=0.1 * math.log(4) + 1)
    deep = {"type": "yarn", "factor": 4.0, "mscale": 0.5, "mscale_all_dim": 1.0}
    factor = read("Qwen2ForCausalLM", rope_scaling=deep).rope_scaling.attention_factor  # type: ignore[union-attr]
    assert factor == pytest.approx((0.05 * math.log(4) + 1) / (0.1 * math.log(4) + 1))
    long = {"type": "su", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    phi = read("Phi3ForCausalLM", rope_scaling=long, max_position_embeddings=16384).rope_scaling
    assert phi is not None and (phi.kind, phi.factor, phi.original_max_length) == ("longrope", 4.0, 4096)
    assert phi.attention_factor == pytest.approx(math.sqrt(1 + math.log(4) / math.log(4096)))  # 1.0801


@pytest.mark.parametrize(
    ("architecture", "fields", "words"),
    [
        ("Gemma2ForCausalLM", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        ("Gemma2ForCausalLM", {"layer_types": ["full_attention"]}, "layer_types: must name .* each of 3 layers"),
        (
            "Gemma2ForCausalLM",
            {"sliding_window": None},
            "layer_types has sliding_attention, but sliding_window is null",
        ),
        ("Gemma2ForCausalLM", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar = 0"),
        ("Gemma3ForCausalLM", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
        ("Gemma3ForCausalLM", {"sliding_window_pattern": 0}, "sliding_window_pattern = 0"),
        (
            "Gemma3ForCausalLM",
            {"rope_parameters": {"full_attention": None}},
            "full_attention = None: must be an object",
        ),
        (
            "Gemma3ForCausalLM",
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "rope_parameters.*not implemented",
        ),
        ("SmolLM3ForCausalLM", {"no_rope_layers": [1]}, "no_rope_layers: must hold"),
        ("Phi3ForCausalLM", {"resid_pdrop": 0.1}, "resid_pdrop = 0.1"),
        ("Phi3ForCausalLM", {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "long_factor is missing"),
        (
            "Phi3ForCausalLM",
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
            "short_factors: 1 numbers; kind 'longrope' needs 4",
        ),
        (
            "Phi3ForCausalLM",
            {"rope_scaling": LONG | {"original_max_position_embeddings": 2048}},
            "original_max_position_embeddings = 2048, but beside it .by default. it is 4096; let both say the same",
        ),
        (
            "GemmaForCausalLM",
            {"hidden_act": "silu", "hidden_activation": "gelu_pytorch_tanh"},
            "hidden_activation = 'gelu_p",
        ),
        (
            "Gemma2ForCausalLM",
            {"hidden_act": "silu"},
            "hidden_act = 'silu', but the activation is 'gelu_tanh'; let both",
        ),
        (
            "Gemma2ForCausalLM",
            {"sliding_window_size": 9},
            "sliding_window_size = 9, but sliding_window is 4096; let both",
        ),
        (
            "Gemma3ForCausalLM",
            {"_sliding_window_pattern": 3},
            "_sliding_window_pattern = 3, but sliding_window_pattern is 6",
        ),
        (
            "Gemma3ForCausalLM",
            {"rope_local_base_freq": 300.0, "rope_parameters": {"sliding_attention": {"rope_theta": 400.0}}},
            "rope_local_base_freq is given as 400.0 and as 300.0; keep one",
        ),
        (
            "Qwen3MoeForCausalLM",
            {"num_experts": 8, "num_local_experts": 4},
            "num_experts = 8, but num_local_experts = 4",
        ),
        ("Olmo2ForCausalLM", {"clip_qkv": 8.0}, "unknown fields clip_qkv"),
        ("MixtralForCausalLM", {"router_jitter_noise": 0.1}, "router_jitter_noise = 0.1"),
        ("MixtralForCausalLM", {"num_experts_per_tok": 9}, "experts_per_token = 9"),
    ],
)
def test_what_a_family_does_not_understand_is_refused_by_name(
    architecture: str, fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=f"^config.json: .*{words}") as caught:
        read(architecture, **fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("architecture", "fields"),
    [
        ("Phi3ForCausalLM", {"auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}, "embd_pdrop": 0.0}),
        ("SmolLM3ForCausalLM", {"pretraining_tp": 2, "max_window_layers": 28, "sliding_window": None}),
        (
            "Gemma2ForCausalLM",
            {"hidden_act": "gelu_pytorch_tanh", "cache_implementation": "hybrid", "sliding_window": 4096},
        ),
        ("Gemma2ForCausalLM", {"hidden_act": "gelu", "sliding_window_size": 4096}),
        ("GemmaForCausalLM", {"hidden_act": "gelu", "hidden_activation": None}),
        ("GemmaForCausalLM", {"hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh", "model_type": "gemma"}),
        ("Qwen3MoeForCausalLM", {"num_experts": 128, "num_local_experts": 128, "max_window_layers": 4}),
        ("Gemma3ForCausalLM", {"_sliding_window_pattern": 6, "attn_logit_softcapping": None}),
        ("Qwen2ForCausalLM", {"use_mrope": False, "use_sliding_window": False, "sliding_window": 131072}),
        ("MixtralForCausalLM", {"output_router_logits": False, "router_jitter_noise": 0.0}),
    ],
)
def test_fields_of_released_files_without_effect(architecture: str, fields: dict[str, Any]) -> None:
    assert read(architecture, **fields) == read(architecture)


def test_gpt2_and_neox_by_hand() -> None:
    sizes = {"vocab_size": 300, "n_embd": 32, "n_layer": 3, "n_head": 4}
    gpt2 = config({"architectures": ["GPT2LMHeadModel"], "resid_pdrop": 0.1} | sizes)
    assert (gpt2.ffn_size, gpt2.max_length, gpt2.positions, gpt2.norm) == (128, 1024, "learned", "layer")
    assert (gpt2.activation, gpt2.gated_mlp, gpt2.tie_embeddings) == ("gelu_tanh", False, True)
    with pytest.raises(InputError, match="scale_attn_weights = 'false': must be true or false"):
        config({"architectures": ["GPT2LMHeadModel"], "scale_attn_weights": "false"} | sizes)
    with pytest.raises(InputError, match="scale_attn_by_inverse_layer_idx = True"):
        config({"architectures": ["GPT2LMHeadModel"], "scale_attn_by_inverse_layer_idx": True} | sizes)
    neox = read("GPTNeoXForCausalLM", rotary_pct=0.25, hidden_size=64)
    assert (neox.rotary_size, neox.head_dim, neox.parallel_residual, neox.qkv_bias) == (4, 16, True, True)


def test_a_scorer_has_one_label() -> None:
    fields = V4 | {"architectures": ["LlamaForSequenceClassification"], "pad_token_id": 0}
    assert config(fields | {"num_labels": 1}).head == "scalar"
    assert config(fields | {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}).head == "scalar"


@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_configurations_go_both_ways(head: Head) -> None:
    before = EXPECTED.replace(head=head, rope_theta=123.0, norm_epsilon=3e-6, tie_embeddings=False)
    assert config(config_to_hf(before)) == before
    assert config_to_hf(before.replace(param_dtype="bfloat16"))["torch_dtype"] == "bfloat16"
    how = before.replace(compute_dtype="bfloat16", remat=True, logits_chunk=7, attention="xla")
    assert config_to_hf(how) == config_to_hf(before)


def test_configurations_that_no_checkpoint_can_express() -> None:
    with pytest.raises(InputError, match="head='lm' or head='scalar'"):
        config_to_hf(EXPECTED.replace(head="lm+scalar"))
    with pytest.raises(InputError, match="hidden_size = 32 is not a multiple of num_heads = 5"):
        config_to_hf(EXPECTED.replace(num_heads=5, num_kv_heads=1))
    with pytest.raises(InputError, match="logit_soft_cap = 3.0: a checkpoint of family 'llama' cannot express this"):
        config_to_hf(EXPECTED.replace(logit_soft_cap=3.0))
    with pytest.raises(InputError, match="family = 'gpt5': one of llama, mistral"):
        config_to_hf(EXPECTED.replace(family="gpt5"))
    with pytest.raises(InputError, match="no tensor for layers/attention/key_norm/scale"):
        weights_of(EXPECTED.replace(qk_norm="head", family="phi3"))


@pytest.mark.parametrize("head", ["lm", "scalar", "lm+scalar"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_name_table_covers_exactly_the_parameters(head: Head, tied: bool) -> None:
    config = tiny_config(head=head, tie_embeddings=tied)
    shapes = {}
    for weight in weights_of(config):
        layers = (config.num_layers,) if weight.layers is not None else ()
        shapes[weight.parameter] = layers + parse(weight.layout).parameter_shape(dimensions(config))
    leaves = jax.tree_util.tree_leaves_with_path(Model(config).abstract())
    assert shapes == {jax.tree_util.keystr(at, simple=True, separator="/"): leaf.shape for at, leaf in leaves}
    names = [weight.tensor for weight in weights_of(config)]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z_.{}]+", name) for name in names)

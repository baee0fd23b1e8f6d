"""config.json fields and name tables of checkpoint families."""

from __future__ import annotations

import re
from typing import Any

import jax
import pytest

from rlhf_jax.io.layout import parse
from rlhf_jax.models import Head, Model, ModelConfig
from rlhf_jax.models.families import config_from_hf, config_to_hf, dimensions, weights_of
from rlhf_jax.testing import tiny_config
from rlhf_jax.types import InputError

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
"""As transformers 4 writes it."""
V5 = {name: value for name, value in V4.items() if name not in ("rope_theta", "rope_scaling", "torch_dtype")} | {
    "rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"},
    "dtype": "bfloat16",
}
"""As transformers 5 writes it."""
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
    return config_from_hf(fields, "config.json")[1]


@pytest.mark.parametrize("fields", [V4, V5])
def test_every_field_arrives(fields: dict[str, Any]) -> None:
    assert config(fields) == EXPECTED


@pytest.mark.parametrize(
    ("theirs", "value", "ours"),
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
def test_each_field_is_its_own(theirs: str, value: Any, ours: str) -> None:
    assert config(V4 | {theirs: value}) == EXPECTED.replace(**{ours: value})


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
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"attention_dropout": 0.1}, "attention_dropout = 0.1"),
        ({"pretraining_tp": 2}, "pretraining_tp = 2"),
        ({"rope_interleaved": True}, "rope_interleaved = True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling.*scaled rotary positions"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.*linear"),
        ({"rope_parameters": {"rope_theta": 5000.0, "partial_rotary_factor": 0.5}}, "rope_parameters.*partial"),
        ({"rope_parameters": {"rope_theta": 6000.0, "rope_type": "default"}}, "given as 5000.0 and as 6000.0"),
        ({"rope_scaling": 2}, "rope_scaling = 2"),
        ({"rope_theta": "big"}, "rope_theta = 'big'"),
        ({"attention_multiplier": 2.0, "logits_scaling": 8}, "unknown fields attention_multiplier, logits_scaling"),
        ({"sliding_window": 4096}, "unknown fields sliding_window"),
        ({"auto_map": {"AutoModel": "x.py"}}, "auto_map.*never run"),
        ({"architectures": ["GemmaForCausalLM"]}, "architecture GemmaForCausalLM is not supported; supported: Llama"),
        ({"architectures": None}, "architectures = None"),
        ({"architectures": ["LlamaForCausalLM", "LlamaForSequenceClassification"]}, "name exactly one"),
        ({"hidden_size": "32"}, "ModelConfig.hidden_size = '32'"),
        ({"rms_norm_eps": None}, "ModelConfig.norm_epsilon = None"),
        ({"tie_word_embeddings": "no"}, "ModelConfig.tie_embeddings"),
        ({"head_dim": None, "num_attention_heads": 5}, "hidden_size = 32, num_attention_heads = 5: not a multiple"),
        (MISTRAL | {"sliding_window": 4096}, "sliding_window = 4096"),
        (MISTRAL, "sliding_window = 4096"),  # absent: MistralConfig's default
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
    assert config(V4 | MISTRAL | {"sliding_window": None}) == EXPECTED


def test_a_scorer_has_one_label() -> None:
    fields = V4 | {"architectures": ["LlamaForSequenceClassification"], "pad_token_id": 0}
    assert config(fields | {"num_labels": 1}).head == "scalar"
    assert config(fields | {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}).head == "scalar"


@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_configurations_go_both_ways(head: Head) -> None:
    before = EXPECTED.replace(head=head, rope_theta=123.0, norm_epsilon=3e-6, tie_embeddings=False)
    assert config(config_to_hf(before)) == before
    assert config_to_hf(before.replace(param_dtype="bfloat16"))["torch_dtype"] == "bfloat16"


def test_what_no_checkpoint_can_say() -> None:
    with pytest.raises(InputError, match="head='lm' or head='scalar'"):
        config_to_hf(EXPECTED.replace(head="lm+scalar"))
    with pytest.raises(InputError, match="hidden_size = 32 is not a multiple of num_heads = 5"):
        config_to_hf(EXPECTED.replace(num_heads=5, num_kv_heads=1))
    with pytest.raises(InputError, match="logit_soft_cap = 3.0: a Llama checkpoint cannot say"):
        config_to_hf(EXPECTED.replace(logit_soft_cap=3.0))


@pytest.mark.parametrize("head", ["lm", "scalar", "lm+scalar"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_name_table_covers_exactly_the_parameters(head: Head, tied: bool) -> None:
    config = tiny_config(head=head, tie_embeddings=tied)
    shapes = {}
    for weight in weights_of(config):
        layers = (config.num_layers,) if "{layer}" in weight.theirs else ()
        shapes[weight.ours] = layers + parse(weight.layout).our_shape(dimensions(config))
    leaves = jax.tree_util.tree_leaves_with_path(Model(config).abstract())
    assert shapes == {jax.tree_util.keystr(at, simple=True, separator="/"): leaf.shape for at, leaf in leaves}
    names = [weight.theirs for weight in weights_of(config)]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z_.{}]+", name) for name in names)

"""Every field of ModelConfig does something, or is listed with the reason why the logits do not change."""

from __future__ import annotations

import dataclasses
import re

import jax
import numpy as np
import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.models import Model, ModelConfig, RopeScaling
from rlhf_jax.testing import random_params, tiny_config

BASE = tiny_config()
TOKENS = np.random.default_rng(0).integers(3, 40, (2, 8)).astype(np.int32)

SHAPES = {  # other parameters: what changes is their shape
    "vocab_size": (48, "['embed']['embedding']", (48, 16)),
    "hidden_size": (12, "['final_norm']['scale']", (12,)),
    "num_layers": (3, "['layers']['mlp']['up']['kernel']", (3, 16, 32)),
    "num_heads": (8, "['layers']['attention']['query']['kernel']", (2, 16, 8, 8)),
    "num_kv_heads": (4, "['layers']['attention']['key']['kernel']", (2, 16, 4, 8)),
    "head_dim": (6, "['layers']['attention']['value']['kernel']", (2, 16, 2, 6)),
    "ffn_size": (24, "['layers']['mlp']['down']['kernel']", (2, 24, 16)),
}
EXPERTS = {"num_experts": 4, "experts_per_token": 2, "expert_ffn_size": 12}
NUMBERS = {  # other logits; parameters that both have are the same
    "rope_theta": {"rope_theta": 500.0},
    "norm_epsilon": {"norm_epsilon": 1e-2},
    "param_dtype": {"param_dtype": "bfloat16"},
    "compute_dtype": {"compute_dtype": "bfloat16"},
    "scale_embeddings": {"scale_embeddings": True},
    "logit_soft_cap": {"logit_soft_cap": 2.0},
    "norm": {"norm": "layer"},
    "norm_placement": {"norm_placement": "both"},
    "norm_offset": {"norm_offset": 1.0},
    "positions": {"positions": "learned"},
    "rope_fraction": {"rope_fraction": 0.5},
    "rope_scaling": {"rope_scaling": RopeScaling("linear", 4.0)},
    "layer_pattern": {"layer_pattern": ("full", "full_nope")},
    "sliding_window": {"layer_pattern": ("sliding",), "sliding_window": 3},
    "qkv_bias": {"qkv_bias": True},
    "output_bias": {"output_bias": True},
    "qk_norm": {"qk_norm": "head"},
    "attention_scale": {"attention_scale": 1.0},
    "attention_soft_cap": {"attention_soft_cap": 1.0},
    "parallel_residual": {"parallel_residual": True},
    "activation": {"activation": "gelu_tanh"},
    "gated_mlp": {"gated_mlp": False},
    "mlp_bias": {"mlp_bias": True},
    "num_experts": EXPERTS,
}
BESIDES = {  # (field, on top of): the same for fields that need another one
    "rope_theta_sliding": ({"layer_pattern": ("sliding",), "sliding_window": 3}, 70.0),
    "experts_per_token": (EXPERTS, 3),
    "expert_ffn_size": (EXPERTS, 16),
    "normalize_expert_weights": (EXPERTS, False),
    "dense_layers": (EXPERTS, (0,)),
}
UNCHANGED = {
    "max_length": ({"max_length": 4096}, "a bound on inputs, not a part of the network"),
    "head": ({"head": "lm+scalar"}, "a second head on the same trunk"),
    "remat": ({"remat": True}, "what is kept for the backward pass"),
    "family": ({"family": "qwen2"}, "how it is exported"),
    "router_coefficient": ({"router_coefficient": 0.1} | EXPERTS, "a part of the loss"),
    "attention": ({"attention": "xla"}, "which implementation; tests/models/test_attention_choice.py"),
    "logits_chunk": ({"logits_chunk": 3}, "how many columns are scored at a time"),
}
BY_HAND = {"tie_embeddings"}


def logits_of(config: ModelConfig, params) -> np.ndarray:
    return np.asarray(jax.jit(Model(config).apply)(params, TOKENS))


@pytest.fixture(scope="module")
def base():
    params = random_params(Model(BASE), 0)
    return params, logits_of(BASE, params)


def test_every_field_is_covered():
    names = [*SHAPES, *NUMBERS, *BESIDES, *UNCHANGED, *BY_HAND]
    assert sorted(names) == sorted(field.name for field in dataclasses.fields(ModelConfig))


@pytest.mark.parametrize("name", SHAPES)
def test_a_size_changes_the_parameters(name):
    value, path, shape = SHAPES[name]
    assert getattr(BASE, name) != value
    leaves = jax.tree_util.tree_flatten_with_path(Model(BASE.replace(**{name: value})).abstract())[0]
    assert {jax.tree_util.keystr(where): leaf.shape for where, leaf in leaves}[path] == shape
    before = jax.tree_util.tree_flatten_with_path(Model(BASE).abstract())[0]
    assert {jax.tree_util.keystr(where): leaf.shape for where, leaf in before}[path] != shape


def test_the_third_layer_is_run(base):
    """Three layers are not two: with the same first two the logits differ, and a layer that adds nothing changes nothing."""
    params, logits = base
    third = random_params(Model(BASE.replace(num_layers=1)), 7)["layers"]

    def logits_with(extra):
        stacked = jax.tree.map(lambda a, b: np.concatenate([a, b]), params["layers"], extra)
        return logits_of(BASE.replace(num_layers=3), params | {"layers": stacked})

    assert np.abs(logits_with(third) - logits).max() > 0.1
    np.testing.assert_allclose(logits_with(jax.tree.map(np.zeros_like, third)), logits, atol=1e-5)


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_changes_the_logits(name, base):
    """A leaf of `random_params` depends on its name and shape alone, so both models share what they both have."""
    _, logits = base
    config = BASE.replace(**NUMBERS[name])
    changed = logits_of(config, random_params(Model(config), 0))
    assert changed.dtype == np.float32
    assert np.abs(changed - logits).max() > 1e-3


@pytest.mark.parametrize("name", BESIDES)
def test_a_field_that_needs_another_changes_the_logits(name):
    before, value = BESIDES[name]
    one, other = BASE.replace(**before), BASE.replace(**before | {name: value})
    assert one != other
    first, second = (logits_of(config, random_params(Model(config), 0)) for config in (one, other))
    assert np.abs(first - second).max() > 1e-3


@pytest.mark.parametrize("name", UNCHANGED)
def test_what_does_not_change_the_logits(name):
    changes = UNCHANGED[name][0]
    before = BASE.replace(**EXPERTS) if "num_experts" in changes else BASE
    config = BASE.replace(**changes)
    assert config != before
    params, own = random_params(Model(before), 0), random_params(Model(config), 0)
    np.testing.assert_array_equal(own["embed"]["embedding"], params["embed"]["embedding"])
    np.testing.assert_allclose(logits_of(config, own), logits_of(before, params), rtol=1e-6, atol=1e-6)


def test_untied_embeddings(base):
    """With its own head set to the transposed table the logits are the tied ones; with another head they are not."""
    params, logits = base
    config = BASE.replace(tie_embeddings=False)
    same = params | {"lm_head": {"kernel": params["embed"]["embedding"].T}}
    np.testing.assert_allclose(logits_of(config, same), logits, rtol=1e-6, atol=1e-6)
    assert np.abs(logits_of(config, random_params(Model(config), 0)) - logits).max() > 0.1


@pytest.mark.parametrize(
    ("field", "value", "remedy"),
    [
        ("vocab_size", 0, "positive whole number"),
        ("hidden_size", 16.0, "positive whole number"),
        ("num_layers", True, "positive whole number"),
        ("num_heads", "4", "positive whole number"),
        ("max_length", -1, "positive whole number"),
        ("num_kv_heads", 3, "num_heads = 4 is not a multiple of num_kv_heads = 3"),
        ("head_dim", 7, "even"),
        ("rope_theta", 0.0, "positive number"),
        ("rope_theta", float("nan"), "positive number"),
        ("rope_theta", float("inf"), "positive number"),
        ("norm_epsilon", "1e-5", "positive number"),
        ("norm_epsilon", 0.0, "positive number"),
        ("head", "value", "lm+scalar"),
        ("param_dtype", "float64", "bfloat16"),
        ("compute_dtype", "fp32", "float32"),
        ("tie_embeddings", "False", "True or False"),
        ("remat", 1, "True, False or 'cheap'"),
        ("remat", "block", "True, False or 'cheap'"),
        ("norm", "batch", "rms, layer"),
        ("norm_offset", -1.0, "number >= 0"),
        ("activation", "relu", "gelu_tanh"),
        ("rope_fraction", 0.4, "even number"),
        ("rope_fraction", 2.0, "even number"),
        ("rope_scaling", {"kind": "linear"}, "RopeScaling"),
        ("rope_scaling", RopeScaling("longrope", 2.0, 16), "short_factors: 0 numbers; kind 'longrope' needs 4"),
        ("layer_pattern", "full", "tuple"),
        ("layer_pattern", ("global",), "full, sliding"),
        ("layer_pattern", ("full",) * 3, "3 kinds for num_layers = 2"),
        ("layer_pattern", ("sliding",), "sliding_window = None"),
        ("sliding_window", 4, "a window sliding layers"),
        ("rope_theta_sliding", 10.0, "needs sliding layers"),
        ("logit_soft_cap", 0.0, "positive number"),
        ("experts_per_token", 2, "num_experts = 0"),
        ("num_experts", 4, "experts_per_token = 0"),
        ("num_experts", -1, "whole number >= 0"),
        ("family", None, "checkpoint format"),
    ],
)
def test_bad_fields_are_refused_by_name(field, value, remedy):
    with pytest.raises(InputError, match=re.escape(remedy)) as error:
        tiny_config(**{field: value})
    assert field in str(error.value) and "\n" not in str(error.value)


def test_json_round_trip_and_what_it_refuses():
    config = tiny_config(rope_theta=1e5, head="scalar", remat=True)
    assert ModelConfig.from_json(config.to_json()) == config
    config = tiny_config(
        rope_scaling=RopeScaling("longrope", 2.0, 16, short_factors=(1.0,) * 4, long_factors=(2.0,) * 4),
        layer_pattern=("sliding", "full"), sliding_window=4, dense_layers=(1,), **EXPERTS,
    )  # fmt: skip
    assert ModelConfig.from_json(config.to_json()) == config
    with pytest.raises(InputError, match=r"there\.json:1: not JSON"):
        ModelConfig.from_json("{", "there.json")
    with pytest.raises(InputError, match=r"there\.json: unknown fields depth"):
        ModelConfig.from_json(config.to_json().replace('"num_layers"', '"depth"'), "there.json")
    with pytest.raises(InputError, match=r"there\.json: .*'vocab_size'"):
        ModelConfig.from_json("{}", "there.json")
    for other in ("[1, 2]", "3", "null"):
        with pytest.raises(InputError, match=r"there\.json: .*object"):
            ModelConfig.from_json(other, "there.json")


def test_a_model_is_hashable_and_without_arrays():
    model = Model(BASE)
    assert hash(model) == hash(Model(tiny_config())) and model == Model(tiny_config())
    assert model.with_head("scalar") != model
    shapes, axes = model.abstract(), model.logical_axes()
    for leaf, names in zip(
        jax.tree.leaves(shapes), jax.tree.leaves(axes, is_leaf=lambda leaf: isinstance(leaf, tuple)), strict=True
    ):
        assert len(names) == len(leaf.shape)

"""Frozen matrices in int8: quantisation by hand, products of the dequantised matrix, adapters trained over it."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import learn
from rlhf_jax.errors import InputError
from rlhf_jax.models import LoraConfig, Model, int8, lora, sequence_logprobs
from rlhf_jax.parallel import MeshConfig, make_mesh, tree_shardings
from rlhf_jax.rollout import SamplingConfig, SlotConfig, generate
from rlhf_jax.testing import prompt_batch, random_params, tiny_config, token_batch

SETTINGS = LoraConfig(rank=3, alpha=6.0, base_dtype="int8")
TOKENS = np.random.default_rng(0).integers(3, 40, (2, 8)).astype(np.int32)
KINDS = [
    {},
    {"layer_pattern": ("full", "sliding"), "sliding_window": 3, "num_layers": 3, "qkv_bias": True},
    {"gated_mlp": False, "mlp_bias": True, "norm": "layer", "parallel_residual": True, "tie_embeddings": False},
]


def quantized(config, seed=0):
    """Return (model, its parameters, the model with the same numbers in float32, its parameters)."""
    plain, model = Model(config), Model(config, int8=True)
    params = jax.tree.map(jnp.asarray, random_params(plain, seed))
    return model, int8.quantized_tree(params, model.abstract()), plain, int8.rounded_tree(params, model.abstract())


def test_by_hand():
    """Per output: s = 1/127 and 8/127; 0.5 * 127 = 63.5 and 4 * 127 / 8 = 63.5 go to the even 64."""
    numbers, scale = int8.quantize(jnp.array([[[1.0, -8.0], [0.5, 4.0]]]), 1)
    assert numbers.dtype == jnp.int8 and numbers.tolist() == [[[127, -127], [64, 64]]]
    assert scale.shape == (1, 2)
    np.testing.assert_allclose(scale, [[1 / 127, 8 / 127]], rtol=1e-7)
    back = int8.dequantize(numbers, scale, jnp.float32)
    np.testing.assert_allclose(back, [[[1.0, -8.0], [64 / 127, 512 / 127]]], rtol=1e-6)


def test_an_output_of_zeros_stays_zero():
    numbers, scale = int8.quantize(jnp.zeros((1, 3, 2)), 1)
    assert not numbers.any() and (scale == 1).all()


@pytest.mark.parametrize(("shape", "inputs"), [((2, 5, 3, 4), 1), ((2, 3, 4, 5), 2)])
def test_every_number_is_off_by_half_a_step_at_most(shape, inputs):
    kernel = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    numbers, scale = int8.quantize(jnp.asarray(kernel), inputs)
    assert scale.shape == (shape[0], *shape[1 + inputs :])
    over = tuple(range(1, 1 + inputs))
    np.testing.assert_allclose(scale, np.abs(kernel).max(axis=over) / 127, rtol=1e-6)
    step = np.expand_dims(np.asarray(scale), over)
    error = np.abs(np.asarray(int8.dequantize(numbers, scale, jnp.float32)) - kernel)
    assert (error <= step * 0.5001).all() and error.max() > 0.45 * step.min()


@pytest.mark.parametrize("changes", KINDS)
def test_logits_are_those_of_the_dequantised_matrices(changes):
    model, params, plain, rounded = quantized(tiny_config(**changes))
    assert jax.tree.structure(params) == jax.tree.structure(model.abstract())
    for leaf, expected in zip(jax.tree.leaves(params), jax.tree.leaves(model.abstract()), strict=True):
        assert (leaf.shape, leaf.dtype) == (expected.shape, expected.dtype)
    logits = jax.jit(lambda m, p: m.apply(p, TOKENS), static_argnums=0)
    np.testing.assert_allclose(logits(model, params), logits(plain, rounded), atol=2e-4)
    exact = random_params(plain, 0)
    assert np.abs(logits(model, params) - logits(plain, exact)).max() > 0.01  # int8 is not exact


def test_only_matrices_of_the_layers_are_quantised():
    model, params, *_ = quantized(tiny_config(tie_embeddings=False, qkv_bias=True))
    names = {
        jax.tree_util.keystr(at, simple=True, separator="/")
        for at, x in jax.tree_util.tree_leaves_with_path(params)
        if x.dtype == jnp.int8
    }
    assert names == {
        f"layers/{part}/kernel"
        for part in (
            "attention/query", "attention/key", "attention/value", "attention/output", "mlp/gate", "mlp/up", "mlp/down",
        )
    }  # fmt: skip
    assert model.logical_axes()["layers"]["attention"]["output"]["kernel_scale"] == ("layers", "embed")
    assert model.logical_axes()["layers"]["attention"]["query"]["kernel_scale"] == ("layers", "heads", "head_dim")


@pytest.mark.parametrize("separate", [False, True])
def test_sampling(separate):
    model, params, plain, rounded = quantized(tiny_config())
    prompts = prompt_batch([[5, 6, 7], [8]], width=4, pad_id=0)
    options = {"sampling": SamplingConfig(temperature=0.0, max_new_tokens=6), "eos_ids": (63,), "pad_id": 0}
    options["slots"] = SlotConfig(separate_layers=separate)
    sample = jax.jit(lambda m, p: generate(m, p, prompts, jax.random.key(0), **options), static_argnums=0)
    actual, expected = sample(model, params), sample(plain, rounded)
    assert actual.tokens.tolist() == expected.tokens.tolist()
    np.testing.assert_allclose(actual.logprobs, expected.logprobs, atol=1e-4)


def test_gradients_of_adapters_over_int8():
    config, batch = tiny_config(), token_batch([[5, 6, 7, 8], [9, 10, 11]])
    whole = jax.tree.map(jnp.asarray, random_params(Model(config, lora=SETTINGS), 0))
    base, adapters = lora.split(whole)
    model = Model(config, lora=SETTINGS, int8=True)
    trees = {
        model: int8.quantized_tree(base, model.abstract()),
        Model(config, lora=SETTINGS): int8.rounded_tree(base, model.abstract()),
    }

    def gradient(model, base):
        loss = learn.make_sft_loss(lambda params, batch: sequence_logprobs(model, params, batch))
        adapted = lora.on_adapters(loss, SETTINGS)
        find = jax.jit(lambda a, b: learn.gradients(adapted, a, {"base": b}, batch, jax.random.key(0), 1)[0])
        return find(adapters, base)

    actual, expected = (gradient(model, base) for model, base in trees.items())
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(other) > 1e-3
        assert np.linalg.norm(one - other) <= 1e-4 * np.linalg.norm(other)


def test_eight_devices_compute_what_one_does():
    model, params, *_ = quantized(tiny_config(num_kv_heads=2))
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    shardings = tree_shardings(model.abstract(), model.logical_axes(), mesh)
    plain = random_params(Model(model.config), 0)
    spread = int8.quantized_tree(
        jax.device_put(plain, tree_shardings(Model(model.config).abstract(), Model(model.config).logical_axes(), mesh)),
        model.abstract(),
        shardings,
    )
    for leaf, sharding in zip(jax.tree.leaves(spread), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(spread), jax.device_get(params))
    logits = jax.jit(functools.partial(model.apply, tokens=TOKENS))
    np.testing.assert_allclose(logits(spread), logits(params), atol=1e-5)


def test_what_it_does_not_combine_with():
    with pytest.raises(InputError, match="LoraConfig.base_dtype = 'int4': give 'int8'"):
        LoraConfig(base_dtype="int4")
    experts = tiny_config(num_experts=4, experts_per_token=2, expert_ffn_size=8)
    with pytest.raises(InputError, match="LoraConfig.base_dtype = 'int8': the matrices of experts are not quantised"):
        Model(experts, int8=True).abstract()

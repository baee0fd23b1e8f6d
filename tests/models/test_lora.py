"""Adapters: outputs equal the merged model's, gradients follow from the base's, and only adapters are trained."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rlhf_jax import learn
from rlhf_jax.errors import InputError
from rlhf_jax.models import LoraConfig, Model, lora, sequence_logprobs
from rlhf_jax.models.model import _abstract
from rlhf_jax.parallel import ActivationConstraint, MeshConfig, batch_sharding, make_mesh, tree_shardings
from rlhf_jax.rollout import SamplingConfig, generate
from rlhf_jax.testing import prompt_batch, random_params, tiny_config, token_batch

CONFIG = LoraConfig(rank=3, alpha=6.0)
MODEL = Model(tiny_config(), lora=CONFIG)
PARAMS = random_params(MODEL, 0)
TOKENS = np.random.default_rng(0).integers(3, 40, (2, 8)).astype(np.int32)


@functools.partial(jax.jit, static_argnums=0)
def logits(model, params):
    return model.apply(params, TOKENS)


def test_scaling_is_alpha_over_the_rank_or_its_root():
    assert LoraConfig(rank=4, alpha=8.0).scaling == 2.0
    assert LoraConfig(rank=4, alpha=8.0, rslora=True).scaling == 4.0


def test_merge_by_hand():
    # A B = [[1], [2]] [[10, 20]] = [[10, 20], [20, 40]]; alpha 2, rank 1
    matrix = {
        "kernel": jnp.array([[[1.0, 2.0], [3.0, 4.0]]]),
        "lora_a": jnp.array([[[1.0], [2.0]]]),
        "lora_b": jnp.array([[[10.0, 20.0]]]),
        "bias": jnp.array([[7.0, 8.0]]),
    }
    merged = lora.merge({"mlp": {"up": matrix}}, LoraConfig(rank=1, alpha=2.0))["mlp"]["up"]
    assert merged.keys() == {"kernel", "bias"}
    assert merged["kernel"].tolist() == [[[21.0, 42.0], [43.0, 84.0]]]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layer_pattern": ("full", "sliding"), "sliding_window": 3, "num_layers": 3, "qkv_bias": True},
        {"gated_mlp": False, "head": "scalar", "parallel_residual": True},
    ],
)
def test_an_adapted_model_computes_what_the_merged_one_does(changes):
    model = Model(tiny_config(**changes), lora=CONFIG)
    params = random_params(model, 1)
    base = Model(model.config)
    hidden = jax.jit(lambda m, p: m.hidden(p, TOKENS), static_argnums=0)
    adapted, merged = hidden(model, params), hidden(base, lora.merge(params, CONFIG))
    assert jax.tree.structure(base.abstract()) == jax.tree.structure(lora.merge(params, CONFIG))
    np.testing.assert_allclose(adapted, merged, atol=1e-4)
    alone = lora.split(params)[0] | ({"scalar_head": params["scalar_head"]} if model.config.has_scalar else {})
    assert np.abs(adapted - hidden(model, alone)).max() > 0.1  # the base is another function


def test_sampling_uses_the_adapters():
    prompts = prompt_batch([[5, 6, 7], [8]], width=4, pad_id=0)
    options = {"sampling": SamplingConfig(temperature=0.0, max_new_tokens=6), "eos_ids": (63,), "pad_id": 0}
    sample = jax.jit(lambda m, p: generate(m, p, prompts, jax.random.key(0), **options), static_argnums=0)
    adapted, merged = sample(MODEL, PARAMS), sample(Model(MODEL.config), lora.merge(PARAMS, CONFIG))
    assert adapted.tokens.tolist() == merged.tokens.tolist()
    np.testing.assert_allclose(adapted.logprobs, merged.logprobs, atol=1e-4)


def test_fresh_adapters_change_nothing():
    params = jax.jit(MODEL.init)(jax.random.key(0))
    base, adapters = lora.split(params)
    assert np.array_equal(logits(MODEL, params), logits(Model(MODEL.config), base))
    a, b = adapters["layers"]["mlp"]["down"]["lora_a"], adapters["layers"]["mlp"]["down"]["lora_b"]
    assert not b.any()
    bound = 32**-0.5  # inputs of mlp/down
    assert 0.8 * bound < jnp.abs(a).max() < bound


def test_split_and_combine_are_inverse_and_the_head_is_trained():
    model = Model(tiny_config(head="scalar"), lora=LoraConfig(rank=2, targets="attention/(query|value)"))
    whole = random_params(model, 0)
    base, trained = lora.split(whole)
    assert trained.keys() == {"layers", "scalar_head"}
    assert trained["layers"].keys() == {"attention"} and trained["layers"]["attention"].keys() == {"query", "value"}
    assert trained["layers"]["attention"]["query"]["lora_a"].shape == (2, 16, 2)
    assert trained["layers"]["attention"]["query"]["lora_b"].shape == (2, 2, 4, 8)
    expected = Model(model.config).abstract()
    del expected["scalar_head"]
    assert jax.tree.structure(base) == jax.tree.structure(expected)
    again = lora.combine(base, trained)
    assert jax.tree.structure(again) == jax.tree.structure(whole)
    assert all(
        restored is original for restored, original in zip(jax.tree.leaves(again), jax.tree.leaves(whole), strict=True)
    )


def sft_loss(model):
    return learn.make_sft_loss(lambda params, batch: sequence_logprobs(model, params, batch))


BATCH = token_batch([[5, 6, 7, 8], [9, 10, 11]])


def test_gradients_of_a_and_b_follow_from_the_merged_matrix():
    # W' = W + s A B, so dL/dA = s dL/dW' B^T and dL/dB = s A^T dL/dW'.
    base, adapters = lora.split(PARAMS)
    loss = lora.on_adapters(sft_loss(MODEL), CONFIG)
    key = jax.random.key(0)
    gradient = jax.jit(lambda a, b: learn.gradients(loss, a, {"base": b}, BATCH, key, 1)[0])(adapters, base)
    plain = sft_loss(Model(MODEL.config))
    of_merged = jax.jit(lambda p: learn.gradients(plain, p, {}, BATCH, key, 1)[0])(lora.merge(PARAMS, CONFIG))
    for part, name, inputs in (("mlp", "up", 1), ("attention", "query", 1), ("attention", "output", 2)):
        actual, kernel = gradient["layers"][part][name], of_merged["layers"][part][name]["kernel"]
        matrices = PARAMS["layers"][part][name]
        flat = np.asarray(kernel).reshape(2, np.prod(kernel.shape[1 : 1 + inputs]), -1)
        a, b = matrices["lora_a"].reshape(2, -1, 3), matrices["lora_b"].reshape(2, 3, -1)
        expected_a = 2.0 * np.einsum("lio,lro->lir", flat, b)
        expected_b = 2.0 * np.einsum("lir,lio->lro", a, flat)
        np.testing.assert_allclose(actual["lora_a"].reshape(a.shape), expected_a, atol=2e-4)
        np.testing.assert_allclose(actual["lora_b"].reshape(b.shape), expected_b, atol=2e-4)


def test_a_step_trains_adapters_only_and_only_they_have_moments():
    base, adapters = lora.split(PARAMS)
    adam = learn.make_optimizer(learn.OptimizerConfig(learning_rate=1e-2), 10)
    state = learn.initial_state(jax.tree.map(jnp.asarray, adapters), adam, jax.random.key(0))
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
    assert moments == 2 * sum(leaf.size for leaf in jax.tree.leaves(adapters))
    step = jax.jit(learn.make_train_step(lora.on_adapters(sft_loss(MODEL), CONFIG), adam))
    losses = []
    for _ in range(5):
        state, metrics = step(state, {"base": base}, BATCH)
        losses.append(float(metrics["loss"].value()))
    assert losses[-1] < losses[0] - 0.1
    assert jax.tree.structure(state.params) == jax.tree.structure(adapters)


def test_dropout_is_unbiased_and_decided_by_the_key():
    model = Model(tiny_config(num_layers=1), lora=LoraConfig(rank=3, alpha=6.0, dropout=0.5, targets="mlp/down"))
    params = random_params(model, 0)
    hidden = jax.jit(lambda p, k: model.hidden(lora.with_dropout(p, k), TOKENS))
    first = hidden(params, jax.random.key(1))
    assert np.array_equal(first, hidden(params, jax.random.key(1)))
    assert np.abs(first - hidden(params, jax.random.key(2))).max() > 0.05
    assert np.abs(first - model.hidden(params, TOKENS)).max() > 0.05

    kernel, rows = params["layers"]["mlp"]["down"], np.ones((1, 1, 32), np.float32)
    assert set(kernel) == {"kernel", "lora_a", "lora_b"}
    keys = jax.random.key_data(jax.random.split(jax.random.key(3), 4000))

    def down(key):  # only the matrix: the final norm after it is not linear
        whole = lora.combine(params, {"layers": {"mlp": {"down": {"dropout_key": key[None]}}}})
        stack = nnx.merge(_abstract(model.config, model.lora, True)[0], whole).layers
        definition, weights = nnx.split(stack)
        return nnx.merge(definition, jax.tree.map(lambda x: x[0], weights)).mlp.down("nf,fd->nd", rows)

    outputs = jax.jit(jax.vmap(down))(keys)[:, 0, 0]
    exact = rows[0, 0] @ (kernel["kernel"][0] + 2.0 * kernel["lora_a"][0] @ kernel["lora_b"][0])
    error = outputs.mean(axis=0) - exact
    assert (np.abs(error) < 5 * outputs.std(axis=0) / 4000**0.5).all()
    assert (outputs.std(axis=0) > 0.1).all()


def test_each_layer_and_matrix_has_its_own_dropout_key():
    keys = [kernel["dropout_key"] for _, kernel in lora.adapted_kernels(lora.with_dropout(PARAMS, jax.random.key(0)))]
    assert len({tuple(np.asarray(key).tolist()) for stack in keys for key in stack}) == 7 * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "LoraConfig.rank = 0"),
        ({"rank": True}, "LoraConfig.rank = True"),
        ({"alpha": 0}, "LoraConfig.alpha = 0"),
        ({"dropout": 1.0}, "LoraConfig.dropout = 1.0"),
        ({"rslora": "True"}, "LoraConfig.rslora = 'True'"),
        ({"targets": "("}, "LoraConfig.targets"),
        ({"targets": None}, "LoraConfig.targets"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        LoraConfig(**changes)


def test_targets_that_name_nothing_are_refused_with_the_names():
    with pytest.raises(InputError, match="q_proj.*there are attention/key, attention/output, attention/query"):
        Model(tiny_config(), lora=LoraConfig(targets="q_proj")).abstract()


def test_weight_decay_takes_adapters_too():
    _, adapters = lora.split(PARAMS)
    config, matrices = learn.OptimizerConfig(learning_rate=0.1, weight_decay=0.5), MODEL.matrices()
    adam = learn.make_optimizer(config, 10, matrices=matrices)
    zero = jax.tree.map(jnp.zeros_like, adapters)
    updates, _ = adam.update(zero, adam.init(adapters), adapters)
    for change, leaf in zip(jax.tree.leaves(updates), jax.tree.leaves(adapters), strict=True):
        np.testing.assert_allclose(change, -0.05 * leaf, rtol=1e-5)


@pytest.mark.parametrize(
    "sizes",
    [
        {"data": 2, "fsdp": 2, "tensor": 2},
        pytest.param({"fsdp": 8}, marks=pytest.mark.slow),
        pytest.param({"fsdp": 4, "tensor": 2}, marks=pytest.mark.slow),
    ],
)
def test_gradients_over_eight_devices_are_those_of_one(sizes):
    """Base and adapters over data, fsdp and tensor; A and B each within 1e-5 of its norm."""
    config = tiny_config(num_kv_heads=2, num_layers=2)
    batch = token_batch([[5, 6, 7, 8], [9, 10, 11], [12, 13, 14, 15, 16], [17, 18]] * 2)
    whole = jax.tree.map(jnp.asarray, random_params(Model(config, lora=CONFIG), 0))

    def gradient(mesh):
        model = Model(config, ActivationConstraint(mesh), lora=CONFIG)
        shardings = tree_shardings(model.abstract(), model.logical_axes(), mesh)
        base, adapters = lora.split(jax.device_put(whole, shardings))
        loss = lora.on_adapters(sft_loss(model), CONFIG)
        rows = jax.device_put(batch, batch_sharding(mesh))
        gradients = jax.jit(lambda a, b, rows: learn.gradients(loss, a, {"base": b}, rows, jax.random.key(0), 1)[0])
        return jax.device_get(gradients(adapters, base, rows))

    one, eight = gradient(make_mesh(MeshConfig(), jax.devices()[:1])), gradient(make_mesh(MeshConfig(**sizes)))
    for actual, expected in zip(jax.tree.leaves(eight), jax.tree.leaves(one), strict=True):
        assert np.linalg.norm(expected) > 1e-3
        assert np.linalg.norm(actual - expected) <= 1e-5 * np.linalg.norm(expected)

"""A run's model with adapters over an int8 base: what is trained, what the reference is, and the same as shapes."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.algorithms.models import Loaded, with_adapters, with_base_dtype
from rlhf_jax.models import LoraConfig, Model, lora
from rlhf_jax.parallel import ActivationConstraint, MeshConfig, abstract_arrays, make_mesh, tree_shardings
from rlhf_jax.testing import byte_tokenizer, random_params, tiny_config

SETTINGS = LoraConfig(rank=2, base_dtype="int8")
MESH = make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])


def loaded(head: str) -> Loaded:
    model = Model(tiny_config(head=head, num_kv_heads=2), ActivationConstraint(MESH))
    shardings = tree_shardings(model.abstract(), model.logical_axes(), MESH)
    return Loaded(model, jax.device_put(random_params(model, 0), shardings), byte_tokenizer(), "somewhere")


def test_adapters_over_an_int8_base():
    adapted = with_adapters(loaded("scalar"), SETTINGS, MESH, jax.random.key(0))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(adapted.params))
    assert adapted.params.keys() == {"layers", "scalar_head"}
    whole = lora.combine(adapted.frozen["base"], adapted.params)
    expected = adapted.model.abstract()
    assert jax.tree.structure(whole) == jax.tree.structure(expected)
    shardings = tree_shardings(expected, adapted.model.logical_axes(), MESH)
    for leaf, target, at in zip(*map(jax.tree.leaves, (whole, expected, shardings)), strict=True):
        assert (leaf.shape, leaf.dtype) == (target.shape, target.dtype)
        assert leaf.sharding.is_equivalent_to(at, leaf.ndim)


def test_the_reference_is_the_base_itself():
    adapted = with_adapters(loaded("lm"), SETTINGS, MESH, jax.random.key(0))
    reference = adapted.base("lm")
    assert reference.model.int8 and reference.model.lora is None
    assert all(map(lambda a, b: a is b, *map(jax.tree.leaves, (reference.params, adapted.frozen["base"]))))
    tokens = jnp.arange(3, 9)[None]
    whole = lora.combine(adapted.frozen["base"], adapted.params)  # fresh adapters: B is 0
    actual, other = (
        jax.jit(m.apply)(p, tokens) for m, p in ((adapted.model, whole), (reference.model, reference.params))
    )
    np.testing.assert_allclose(actual, other, atol=1e-5)


def test_what_is_int8_already_is_taken_as_it_is():
    judge = with_base_dtype(loaded("scalar"), SETTINGS, MESH)
    critic = with_adapters(judge, SETTINGS, MESH, jax.random.key(0))
    actual, reference = critic.frozen["base"]["layers"], judge.params["layers"]
    assert all(map(lambda a, b: a is b, *map(jax.tree.leaves, (actual, reference))))


def test_shapes_give_the_shapes():
    real = loaded("lm")
    shardings = tree_shardings(real.model.abstract(), real.model.logical_axes(), MESH)
    shapes = dataclasses.replace(real, params=abstract_arrays(real.model.abstract(), shardings))
    planned, run = (with_adapters(one, SETTINGS, MESH, jax.random.key(0)) for one in (shapes, real))
    for tree in ("params", "frozen"):
        for a, b in zip(*(jax.tree.leaves(getattr(one, tree)) for one in (planned, run)), strict=True):
            assert isinstance(a, jax.ShapeDtypeStruct)
            assert (a.shape, a.dtype) == (b.shape, b.dtype) and a.sharding.is_equivalent_to(b.sharding, b.ndim)

"""Arrays are created on their shards, and each device holds the bytes that the rules predict."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from rlhf_jax import learn, ops
from rlhf_jax.errors import InputError
from rlhf_jax.models import Model, ModelConfig
from rlhf_jax.parallel import (
    ActivationConstraint,
    init_sharded,
    replicated,
    state_shardings,
    to_global,
    tree_shardings,
)
from rlhf_jax.testing import MESHES_OF_EIGHT, bytes_per_device, mesh_of, random_params, random_prompts, tiny_config

FLOAT = 4


def parameter_bytes(config: ModelConfig, fsdp: int, tensor: int) -> int:
    """Return the bytes per device, by hand, float32: matrices divided by fsdp and tensor, norms whole."""
    d, h, g, k = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
    layer = 2 * d * h * k + 2 * d * g * k + 3 * d * config.ffn_size
    split = config.vocab_size * d + config.num_layers * layer
    return FLOAT * (split // (fsdp * tensor) + (2 * config.num_layers + 1) * d)


def adam_state(model: Model, optimizer, params):
    del model
    return learn.initial_state(params, optimizer, jax.random.key(0))


@pytest.mark.parametrize("name", MESHES_OF_EIGHT)
def test_parameters_and_moments_shrink_as_predicted(name):
    data, fsdp, tensor = MESHES_OF_EIGHT[name]
    mesh = mesh_of(data, fsdp, tensor)
    model = Model(tiny_config())
    shardings = tree_shardings(model.abstract(), model.logical_axes(), mesh)
    params = jax.device_put(random_params(model, 0), shardings)
    optimizer = learn.make_optimizer(learn.OptimizerConfig(weight_decay=0.1), steps=10, matrices=model.matrices())
    state = init_sharded(functools.partial(adam_state, model, optimizer), shardings, mesh, params)

    one = parameter_bytes(model.config, fsdp, tensor)
    assert set(bytes_per_device(state.params).values()) == {one} and len(bytes_per_device(state.params)) == 8
    counts = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim == 0]
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim > 0]
    assert len(counts) == 2 and all(leaf.sharding.is_fully_replicated for leaf in counts)
    assert set(bytes_per_device(moments).values()) == {2 * one}
    if fsdp * tensor > 1:
        assert one < parameter_bytes(model.config, 1, 1) / 2.5
    adam = next(entry for entry in state.opt_state if isinstance(entry, optax.ScaleByAdamState))
    for moment in (adam.mu, adam.nu):
        assert jax.tree.map(lambda leaf: leaf.sharding, moment) == shardings
    assert state.step.sharding.is_fully_replicated and state.rng.sharding.is_fully_replicated


@pytest.mark.parametrize("name", MESHES_OF_EIGHT)
def test_the_cache_shrinks_as_predicted(name):
    data, fsdp, tensor = MESHES_OF_EIGHT[name]
    mesh = mesh_of(data, fsdp, tensor)
    model = Model(tiny_config(), ActivationConstraint(mesh))
    shardings = tree_shardings(model.abstract(), model.logical_axes(), mesh)
    params = jax.device_put(random_params(model, 0), shardings)
    prompts = to_global(random_prompts(0, 16, 4, 64), mesh)

    @jax.jit
    def prefill(params, prompts):
        return model.prefill(params, prompts.tokens, prompts.mask, ops.positions_from_mask(prompts.mask), 12)[1]

    cache = prefill(params, prompts)
    # layers 2, rows 16 / (data fsdp), heads 2 / tensor, columns 12, width 8; keys and values
    predicted = 2 * FLOAT * 2 * (16 // (data * fsdp)) * (2 // tensor) * 12 * 8
    assert set(bytes_per_device((cache.keys, cache.values)).values()) == {predicted}


def test_initial_parameters_are_the_same_on_every_mesh():
    """Initialized on the shards with the partitionable threefry: the mesh decides on which device a number is, not its value."""
    model = Model(tiny_config())
    mesh = mesh_of(2, 2, 2)

    def some(tree):  # compiling the initialization of all takes ten times as long
        return {"embed": tree["embed"], "layers": {"attention": {"output": tree["layers"]["attention"]["output"]}}}

    shardings = some(tree_shardings(model.abstract(), model.logical_axes(), mesh))
    params = init_sharded(lambda key: some(model.init(key)), shardings, mesh, jax.random.key(3))
    assert jax.tree.map(lambda leaf: leaf.sharding, params) == shardings
    alone = jax.jit(lambda key: some(model.init(key)))(jax.random.key(3))
    for sharded, expected in zip(jax.tree.leaves(params), jax.tree.leaves(alone), strict=True):
        np.testing.assert_array_equal(sharded, expected)


def test_state_shardings_follow_the_end_of_the_path():
    mesh = mesh_of(2, 2, 2)
    shardings = {
        "policy": {"w": jax.NamedSharding(mesh, P("fsdp"))},
        "value": {"w": jax.NamedSharding(mesh, P("tensor"))},
    }
    leaf = jax.ShapeDtypeStruct((4,), jnp.float32)
    state = {
        "params": {"policy": {"w": leaf}, "value": {"w": leaf}},
        "moments": ({"policy": {"w": leaf}}, {"value": {"w": leaf}}),
        "count": jax.ShapeDtypeStruct((), jnp.int32),
        "factored": {"policy": {"w": jax.ShapeDtypeStruct((), jnp.float32)}},  # the parameter's name, but not its shape
        "w": leaf,  # not the whole path of a parameter
    }
    actual = state_shardings(state, shardings, mesh)
    assert actual["params"] == shardings
    assert actual["moments"] == ({"policy": shardings["policy"]}, {"value": shardings["value"]})
    assert actual["count"] == actual["factored"]["policy"]["w"] == actual["w"] == replicated(mesh)


def test_host_batches_become_global_rows():
    mesh = mesh_of(2, 2, 2)
    batch = {"tokens": np.arange(24, dtype=np.int32).reshape(8, 3), "mask": np.arange(8) % 2 == 0}
    arrays = to_global(batch, mesh)
    np.testing.assert_array_equal(arrays["tokens"], batch["tokens"])
    assert arrays["mask"].dtype == bool
    shapes = {shard.device.id: shard.data.shape for shard in arrays["tokens"].addressable_shards}
    assert set(shapes.values()) == {(2, 3)} and len(shapes) == 8  # two rows each, the same on both devices of tensor
    with pytest.raises(InputError, match="6 rows does not divide over 4 devices"):
        to_global(np.zeros((6, 2)), mesh)

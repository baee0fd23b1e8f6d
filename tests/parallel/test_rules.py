"""The table from logical axes to mesh axes, and shardings made from it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from rlhf_jax.errors import InputError
from rlhf_jax.models import KVCache, Model
from rlhf_jax.parallel import (
    AXES,
    RULES,
    ActivationConstraint,
    batch_sharding,
    partition_spec,
    replicated,
    tree_shardings,
)
from rlhf_jax.testing import MESHES_OF_EIGHT, mesh_of, tiny_config, tiny_model


def test_specs_by_hand():
    assert partition_spec(("layers", "embed", "heads", "head_dim")) == P(None, ("fsdp",), ("tensor",), None)
    assert partition_spec(("vocab", "embed_table")) == P(("fsdp", "tensor"), None)
    assert partition_spec(("act_batch",)) == P(("data", "fsdp", "expert"))
    assert partition_spec(("experts", "expert_embed", "expert_mlp")) == P(("expert",), ("fsdp",), ("tensor",))
    assert partition_spec(("act_batch", "act_length")) == P(("data", "fsdp", "expert"), ("sequence",))
    assert partition_spec(KVCache.LOGICAL_AXES) == P(None, ("data", "fsdp", "expert"), ("tensor",), None, None)
    assert partition_spec(()) == P()
    own = {**RULES, "embed": ("tensor",)}
    assert partition_spec(("embed",), own) == P(("tensor",)) and partition_spec(("embed",)) == P(("fsdp",))


def test_an_unknown_axis_is_named():
    with pytest.raises(InputError, match="'width' is not in the rules table; known: .*'?embed"):
        partition_spec(("embed", "width"))


def test_the_table_splits_every_matrix_and_names_only_mesh_axes():
    assert {axis for axes in RULES.values() for axis in axes} == set(AXES)
    model, _ = tiny_model("lm+scalar", tie_embeddings=False)
    leaves = jax.tree_util.tree_flatten_with_path(model.logical_axes(), is_leaf=lambda leaf: isinstance(leaf, tuple))[0]
    for path, names in leaves:
        mesh_axes = [axis for name in names for axis in RULES[name]]
        assert len(mesh_axes) == len(set(mesh_axes)), f"{path}: one mesh axis on two dimensions"
        small = any(word in jax.tree_util.keystr(path) for word in ("norm", "scalar_head"))
        assert small or {"fsdp", "tensor"} <= set(mesh_axes), f"{path} is replicated over fsdp or tensor"


@pytest.mark.parametrize("name", MESHES_OF_EIGHT)
def test_parameters_get_the_rules_sharding(name):
    mesh = mesh_of(*MESHES_OF_EIGHT[name])
    model, _ = tiny_model(tie_embeddings=False)
    shardings = tree_shardings(model.abstract(), model.logical_axes(), mesh)
    expected = {
        ("embed", "embedding"): P(("fsdp", "tensor"), None),
        ("lm_head", "kernel"): P(None, ("fsdp", "tensor")),
        ("layers", "attention", "output", "kernel"): P(None, ("tensor",), None, ("fsdp",)),
        ("layers", "mlp", "down", "kernel"): P(None, ("tensor",), ("fsdp",)),
        ("final_norm", "scale"): P(None),
    }
    for path, spec in expected.items():
        actual = shardings
        for key in path:
            actual = actual[key]
        assert actual == NamedSharding(mesh, spec), path
    assert batch_sharding(mesh).spec == P(("data", "fsdp", "expert")) and replicated(mesh).spec == P()


@pytest.mark.parametrize(
    ("changes", "sizes", "parameter", "size"),
    [
        ({"vocab_size": 60}, (1, 8, 1), r"\['embed'\]\['embedding'\]", 60),
        ({"num_kv_heads": 1}, (4, 1, 2), r"\['attention'\]\['key'\]\['kernel'\]", 1),
        ({"hidden_size": 20}, (1, 8, 1), r"\['kernel'\]", 20),
        ({"ffn_size": 31}, (4, 1, 2), r"\['mlp'\]\['down'\]\['kernel'\]", 31),
    ],
)
def test_a_dimension_that_does_not_divide_is_named(changes, sizes, parameter, size):
    model = Model(tiny_config(**changes))
    with pytest.raises(InputError, match=f"{parameter} has a dimension of {size}, not divisible") as error:
        tree_shardings(model.abstract(), model.logical_axes(), mesh_of(*sizes))
    assert "MeshConfig" in str(error.value) and "\n" not in str(error.value)


def test_activations_are_sharded_where_they_divide():
    mesh = mesh_of(2, 2, 2)
    constrain = ActivationConstraint(mesh)
    assert hash(constrain) == hash(ActivationConstraint(mesh_of(2, 2, 2)))
    x = np.arange(8 * 3 * 4, dtype=np.float32).reshape(8, 3, 4)
    sharded = jax.jit(lambda x: constrain(x * 1, ("act_batch", "act_length", "act_vocab")))(x)
    assert sharded.sharding.is_equivalent_to(
        NamedSharding(mesh, P(("data", "fsdp", "expert"), "sequence", "tensor")), 3
    )
    np.testing.assert_array_equal(sharded, x)
    # three rows do not divide over four devices: same values, the sharding is left to the compiler
    np.testing.assert_array_equal(
        jax.jit(lambda x: constrain(x * 1, ("act_batch", "act_length", "act_vocab")))(x[:3]), x[:3]
    )
    with pytest.raises(InputError, match="'act_width'"):
        constrain(jnp.zeros((8,)), ("act_width",))

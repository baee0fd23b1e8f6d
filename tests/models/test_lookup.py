"""Embedding lookup in a table that is split over a mesh, against indexing on one device."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rlhf_jax.models.layout import unconstrained
from rlhf_jax.models.lookup import Island, look_up
from rlhf_jax.parallel import ActivationConstraint, MeshConfig, make_mesh

WORDS, WIDTH = 16, 4
MESHES = [
    MeshConfig(fsdp=8),
    MeshConfig(fsdp=4, tensor=2),
    MeshConfig(data=2, fsdp=2, tensor=2),
    MeshConfig(data=2, fsdp=2, sequence=2),
    MeshConfig(fsdp=2, tensor=2, expert=2),
    MeshConfig(fsdp=1, tensor=8),
    MeshConfig(data=8, fsdp=1),
]


def on(mesh, *axes) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(*axes))


@pytest.mark.parametrize("config", MESHES, ids=str)
@pytest.mark.parametrize("shape", [(8, 2), (8, 8), (3, 5)], ids=["rows travel", "the table travels", "undivided"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_rows_are_the_same_and_gradients_are_summed_in_float32(config: MeshConfig, shape, dtype) -> None:
    """Gradients of 64 rows summed in bfloat16 would lose digits; in float32 sums of these integers are exact in any order."""
    mesh, draw = make_mesh(config), np.random.default_rng(0)
    table = draw.normal(size=(WORDS, WIDTH)).astype(np.float32)
    tokens = draw.integers(0, WORDS, shape).astype(np.int32)
    weights = draw.integers(-255, 256, (*shape, WIDTH)).astype(np.float32)
    expected = table.astype(dtype)[tokens]
    summed = np.zeros_like(table)
    np.add.at(summed, tokens, weights)

    def loss(table: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        rows = look_up(table, tokens, dtype, ActivationConstraint(mesh))
        return (rows.astype(jnp.float32) * weights).sum(), rows

    sharded_table = jax.device_put(table, on(mesh, ("fsdp", "tensor")))
    (_, rows), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(sharded_table, tokens)
    assert rows.dtype == dtype and gradient.dtype == jnp.float32
    np.testing.assert_array_equal(rows, expected)
    if dtype == jnp.float32 or not _plain(mesh):
        np.testing.assert_array_equal(gradient, summed)


def _plain(mesh) -> bool:
    return mesh.shape["fsdp"] * mesh.shape["tensor"] == 1


@pytest.mark.parametrize("shape", [(8, 2), (8, 8)], ids=["rows travel", "the table travels"])
def test_ids_outside_the_table_are_those_of_jnp_take(shape) -> None:
    """Negative ids count from the end; ids outside the table give NaN and have no gradient."""
    mesh, draw = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)), np.random.default_rng(1)
    table = draw.normal(size=(WORDS, WIDTH)).astype(np.float32)
    tokens = draw.integers(0, WORDS, shape).astype(np.int32)
    tokens[0, :2], tokens[3, 0], tokens[5, 1] = (-1, WORDS), 2 * WORDS, -WORDS - 1

    def loss(table: jax.Array, constrain) -> tuple[jax.Array, jax.Array]:
        rows = look_up(table, tokens, jnp.float32, constrain)
        return jnp.nansum(rows**2), rows

    expected = jax.value_and_grad(loss, has_aux=True)(table, unconstrained)
    actual = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)(
        jax.device_put(table, on(mesh, ("fsdp", "tensor"))), ActivationConstraint(mesh)
    )
    np.testing.assert_array_equal(actual[0][1], expected[0][1])
    assert np.isnan(expected[0][1][0, 1]).all() and not np.isnan(expected[0][1][0, 0]).any()
    np.testing.assert_allclose(actual[1], expected[1], rtol=1e-6)


def test_the_smaller_array_is_transferred() -> None:
    """A table of 16 rows; four devices along fsdp with 4 tokens each look up 16 rows, with 5 tokens each 20."""
    island = Island(make_mesh(MeshConfig(data=2, fsdp=4)), ("fsdp", "tensor"), ("data", "fsdp"), (), 16, None, None)
    assert [island.table_travels(jnp.zeros((1, size))) for size in (4, 5)] == [False, True]


@pytest.mark.parametrize("length", [2, 64], ids=["rows travel", "the table travels"])
def test_no_device_holds_more_than_the_transferred_array(length: int) -> None:
    """Rows of all devices' tokens exist only where rows are transferred, the whole table only where the table is."""
    mesh = make_mesh(MeshConfig(fsdp=8))
    constrain = ActivationConstraint(mesh)

    def loss(table: jax.Array, tokens: jax.Array) -> jax.Array:
        return (look_up(table, tokens, jnp.float32, constrain) ** 2).sum()

    table = jax.ShapeDtypeStruct((128, 32), jnp.float32, sharding=on(mesh, ("fsdp", "tensor")))
    tokens = jax.ShapeDtypeStruct((8, length), jnp.int32, sharding=on(mesh, "fsdp"))
    compiled = jax.jit(jax.grad(loss)).lower(table, tokens).compile()
    text = compiled.as_text()
    travels = length > 2
    assert ("f32[128,32]" in text) == travels and (f"f32[8,{length},32]" in text) == (not travels)
    assert compiled.output_shardings.shard_shape((128, 32)) == (16, 32)

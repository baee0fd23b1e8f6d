"""Ring attention over simulated devices against the same attention on one device, and against a loop in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.models import Model
from rlhf_jax.models.attention import attend, segment_mask
from rlhf_jax.models.ring import ring_attention
from rlhf_jax.parallel import ActivationConstraint, tree_shardings
from rlhf_jax.testing import mesh_of, random_params, tiny_config

ROWS, LENGTH, GROUPS, PER_GROUP, SIZE = 2, 16, 2, 2, 8
HIGHEST = jax.lax.Precision.HIGHEST
AXES = ("act_batch", "act_kv_heads", "act_length", "act_head_dim")
SEGMENTS = np.array([[1] * 5 + [2] * 8 + [0] * 3, [1] * 2 + [2] * 14], np.int32)
"""Packed: two documents per row that do not end where devices do, padding at the end of the first row."""


def inputs(dtype: str = "float32") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    query = rng.standard_normal((ROWS, LENGTH, GROUPS, PER_GROUP, SIZE))
    key, value = rng.standard_normal((2, ROWS, GROUPS, LENGTH, SIZE))
    return tuple(jnp.asarray(x, dtype) for x in (query, key, value))


def ring(sizes: dict[str, int], window: int | None, cap: float | None):
    mesh = mesh_of(**sizes)
    spec = ActivationConstraint(mesh).spec(AXES, (ROWS, GROUPS, LENGTH, SIZE))

    def call(query, key, value):
        settings = {"window": window, "scale": 0.4, "cap": cap, "precision": HIGHEST, "mesh": mesh, "key_spec": spec}
        return ring_attention(query, key, value, jnp.asarray(SEGMENTS), **settings)

    return jax.jit(call)


def alone(window: int | None, cap: float | None):
    mask = segment_mask(jnp.asarray(SEGMENTS), window)
    return jax.jit(lambda query, key, value: attend(query, key, value, mask, HIGHEST, scale=0.4, cap=cap))


def by_a_loop(query, key, value, window: int | None, cap: float | None) -> np.ndarray:
    """Compute attention in float64, one query after another; padding gives 0."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    out = np.zeros(query.shape)
    for row, at, group, head in np.ndindex(ROWS, LENGTH, GROUPS, PER_GROUP):
        visible = [
            column
            for column in range(max(0, 0 if window is None else at - window + 1), at + 1)
            if SEGMENTS[row, column] == SEGMENTS[row, at] > 0
        ]
        if visible:
            scores = 0.4 * key[row, group, visible] @ query[row, at, group, head]
            scores = scores if cap is None else cap * np.tanh(scores / cap)
            weights = np.exp(scores - scores.max())
            out[row, at, group, head] = weights @ value[row, group, visible] / weights.sum()
    return out


@pytest.mark.parametrize(
    "sizes",
    [{"sequence": 8}, pytest.param({"sequence": 2, "data": 2, "tensor": 2}, marks=pytest.mark.slow)],
    ids=str,
)
@pytest.mark.parametrize(("window", "cap"), [(None, None), (3, None), (7, 2.0)])
def test_a_ring_is_the_attention_of_a_loop(sizes: dict[str, int], window: int | None, cap: float | None) -> None:
    """Windows that end the ring early: 3 columns reach back one block of 2 columns, 7 columns three blocks."""
    query, key, value = inputs()
    actual = np.asarray(ring(sizes, window, cap)(query, key, value))
    real = SEGMENTS > 0
    np.testing.assert_allclose(actual[real], by_a_loop(query, key, value, window, cap)[real], rtol=1e-5, atol=1e-6)
    assert np.isfinite(actual).all()


@pytest.mark.parametrize("window", [pytest.param(None, marks=pytest.mark.slow), 3])
def test_gradients_are_those_of_one_device(window: int | None) -> None:
    real = jnp.asarray(SEGMENTS > 0)[:, :, None, None, None]
    weights = np.random.default_rng(1).standard_normal((ROWS, LENGTH, GROUPS, PER_GROUP, SIZE)).astype(np.float32)

    def gradients(call):
        loss = lambda *arrays: (jnp.where(real, call(*arrays), 0) * weights).sum()  # noqa: E731
        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*inputs())

    for actual, expected in zip(
        gradients(ring({"sequence": 4}, window, 2.0)), gradients(alone(window, 2.0)), strict=True
    ):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_bfloat16_keeps_float32_sums() -> None:
    """The error against float32 is that of `attend`."""
    real, exact = SEGMENTS > 0, np.asarray(alone(None, None)(*inputs()))
    rounded = [
        np.asarray(call(*inputs("bfloat16")), np.float32)
        for call in (ring({"sequence": 8}, None, None), alone(None, None))
    ]
    off = [np.abs(one - exact)[real].max() for one in rounded]
    assert off[0] < 1.5 * off[1] < 0.05


def test_a_device_holds_scores_of_its_own_columns_only() -> None:
    """Rows of 1024 columns on 8 devices: no buffer of the compiled program is as large as [R S, C] scores of one row."""
    mesh = mesh_of(sequence=8)
    model = Model(tiny_config(max_length=2048, remat=True), ActivationConstraint(mesh))
    shapes = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        model.abstract(),
        tree_shardings(model.abstract(), model.logical_axes(), mesh),
    )
    tokens = jax.ShapeDtypeStruct((1, 1024), jnp.int32)
    step = jax.jit(jax.grad(lambda params, tokens: model.hidden(params, tokens).sum()))
    memory = step.lower(shapes, tokens).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * 1024 * 1024 * 4 / 4  # heads x columns x columns x float32 is 16.8 MB


@pytest.mark.parametrize("changes", [{"attention": "splash"}, {"attention": "cudnn"}])
def test_fused_implementations_cannot_split_columns(changes: dict[str, str]) -> None:
    model = Model(tiny_config(compute_dtype="bfloat16", **changes), ActivationConstraint(mesh_of(sequence=2)))
    with pytest.raises(InputError, match="ModelConfig.attention"):
        jax.eval_shape(model.apply, model.abstract(), jax.ShapeDtypeStruct((2, 16), jnp.int32))


def test_rows_that_do_not_divide_are_rejected() -> None:
    model = Model(tiny_config(), ActivationConstraint(mesh_of(sequence=4)))
    with pytest.raises(InputError, match=r"MeshConfig\.sequence = 4: rows of 10 columns do not divide"):
        jax.eval_shape(model.apply, model.abstract(), jax.ShapeDtypeStruct((2, 10), jnp.int32))


@pytest.mark.parametrize(
    "changes", [{"layer_pattern": ("sliding", "full"), "sliding_window": 4}], ids=["sliding and full"]
)
def test_logits_of_a_model_with_packed_rows(changes: dict) -> None:
    mesh = mesh_of(sequence=4, tensor=2)
    config = tiny_config(**changes)
    model = Model(config, ActivationConstraint(mesh))
    params = random_params(model, 0)
    spread = jax.device_put(params, tree_shardings(model.abstract(), model.logical_axes(), mesh))
    tokens = np.random.default_rng(2).integers(3, 64, (ROWS, LENGTH)).astype(np.int32)
    positions = np.array([[*range(5), *range(8), 0, 0, 0], [*range(2), *range(14)]], np.int32)
    inputs = {"positions": positions, "segment_ids": SEGMENTS}
    actual = np.asarray(jax.jit(lambda params: model.apply(params, tokens, **inputs))(spread))
    expected = np.asarray(jax.jit(lambda params: Model(config).apply(params, tokens, **inputs))(params))
    real = SEGMENTS > 0
    np.testing.assert_allclose(actual[real], expected[real], rtol=0, atol=1e-5 * np.abs(expected[real]).max())

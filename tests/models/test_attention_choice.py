"""All implementations of attention give the same numbers, and reject settings that they do not support."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from rlhf_jax.errors import InputError
from rlhf_jax.models import Model
from rlhf_jax.models.attention import attend, choose_implementation, fused_attention, segment_mask
from rlhf_jax.models.splash import splash_attention
from rlhf_jax.parallel import ActivationConstraint, MeshConfig, make_mesh
from rlhf_jax.testing import tiny_config, tiny_model

BATCH, LENGTH, GROUPS, PER_GROUP, SIZE = 4, 20, 2, 3, 16
SCALE = 0.3


@functools.cache
def inputs():
    """Return queries, keys, values and segments: packed rows, left and right padding, a row of one document."""
    draw = np.random.default_rng(0)
    query = draw.normal(size=(BATCH, LENGTH, GROUPS, PER_GROUP, SIZE)).astype(np.float32)
    key, value = draw.normal(size=(2, BATCH, GROUPS, LENGTH, SIZE)).astype(np.float32)
    segments = np.ones((BATCH, LENGTH), np.int32)
    segments[0] = [1] * 7 + [2] * 5 + [3] * 4 + [0] * 4
    segments[1, :6] = 0
    segments[2, 12:] = 2
    return query, key, value, segments


def values_and_gradients(attention):
    """Return (values, gradients in query, key and value of a weighted sum) of the queries that are not padding."""
    query, key, value, segments = inputs()
    counted = jnp.asarray(segments > 0)[:, :, None, None, None]
    weights = np.random.default_rng(1).normal(size=query.shape).astype(np.float32)

    @jax.jit
    def run(*arrays):
        def total(query, key, value):
            mixed = jnp.where(counted, attention(query, key, value, segments), 0.0)
            return (weights * mixed).sum(), mixed

        (_, mixed), grads = jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)(*arrays)
        return mixed, *grads

    return run(query, key, value)


def reference(window, cap):
    def attention(query, key, value, segments):
        mask = segment_mask(jnp.asarray(segments), window)
        return attend(query, key, value, mask, jax.lax.Precision.HIGHEST, scale=SCALE, cap=cap)

    return values_and_gradients(attention)


@pytest.mark.parametrize(("window", "cap"), [(None, None), (3, None), (None, 0.8), (6, 0.8)])
def test_splash_equals_xla(window, cap):
    splash = functools.partial(splash_attention, window=window, scale=SCALE, cap=cap, interpret=True)
    for actual, expected in zip(values_and_gradients(splash), reference(window, cap), strict=True):
        np.testing.assert_allclose(actual, expected, atol=2e-5)


@pytest.mark.parametrize("tensor", [1, 2])
def test_the_splash_island_equals_xla_over_a_mesh(tensor):
    mesh = jax.make_mesh((4 // tensor, tensor), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    spec = PartitionSpec("data", "tensor", None, None)

    def splash(query, key, value, segments):
        key = jax.lax.with_sharding_constraint(key, NamedSharding(mesh, spec))
        options = {"window": 6, "scale": SCALE, "cap": None, "mesh": mesh, "key_spec": spec, "interpret": True}
        return splash_attention(query, key, value, jnp.asarray(segments), **options)

    for actual, expected in zip(values_and_gradients(splash), reference(6, None), strict=True):
        np.testing.assert_allclose(actual, expected, atol=2e-5)


@pytest.mark.parametrize("window", [None, 3])
def test_the_arguments_of_cudnn_equal_xla(window):
    fused = functools.partial(fused_attention, window=window, scale=SCALE, implementation="xla")
    for actual, expected in zip(values_and_gradients(fused), reference(window, None), strict=True):
        np.testing.assert_allclose(actual, expected, atol=2e-5)


def constraint_on(platform):
    """Return a stand-in for a constraint over a mesh of that platform."""
    device = SimpleNamespace(platform=platform)
    mesh = SimpleNamespace(devices=np.asarray([device], dtype=object))
    return SimpleNamespace(mesh=mesh, parts=lambda axis: 1)


@pytest.mark.parametrize(
    ("platform", "changes", "expected"),
    [
        ("cpu", {"compute_dtype": "bfloat16"}, "xla"),
        ("tpu", {"compute_dtype": "bfloat16"}, "splash"),
        ("tpu", {"compute_dtype": "bfloat16", "attention_soft_cap": 30.0}, "splash"),
        ("tpu", {"compute_dtype": "float32"}, "xla"),
        ("tpu", {"compute_dtype": "bfloat16", "attention": "xla"}, "xla"),
        ("gpu", {"compute_dtype": "bfloat16"}, "cudnn"),
        ("gpu", {"compute_dtype": "bfloat16", "attention_soft_cap": 30.0}, "xla"),
    ],
)
def test_auto_selects_what_platform_and_layer_support(platform, changes, expected):
    assert choose_implementation(tiny_config(**changes), constraint_on(platform)) == expected


@pytest.mark.parametrize(
    ("platform", "changes", "missing"),
    [
        ("cpu", {"attention": "splash", "compute_dtype": "bfloat16"}, "platform 'cpu'"),
        ("tpu", {"attention": "splash"}, "compute_dtype 'float32'"),
        ("tpu", {"attention": "cudnn", "compute_dtype": "bfloat16"}, "platform 'tpu'"),
        ("gpu", {"attention": "cudnn", "compute_dtype": "bfloat16", "attention_soft_cap": 30.0}, "attention_soft_cap"),
    ],
)
def test_unsupported_settings_of_a_named_implementation_fail(platform, changes, missing):
    with pytest.raises(InputError, match=missing):
        choose_implementation(tiny_config(**changes), constraint_on(platform))


def test_the_platform_is_that_of_the_mesh():
    model, params = tiny_model(attention="splash", compute_dtype="bfloat16")
    tokens = np.ones((2, 4), np.int32)
    for constrained in (model, Model(model.config, ActivationConstraint(make_mesh(MeshConfig(), jax.devices()[:1])))):
        with pytest.raises(InputError, match="ModelConfig.attention = 'splash' does not support platform 'cpu'"):
            jax.eval_shape(constrained.apply, params, tokens)

"""Splash attention compiles for a TPU slice, forward and backward, over a mesh that splits rows and heads."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

from rlhf_jax.models import Model, ModelConfig
from rlhf_jax.models.attention import choose_implementation
from rlhf_jax.parallel import ActivationConstraint, MeshConfig, batch_sharding, make_mesh, tree_shardings

pytestmark = pytest.mark.tpu_aot


@pytest.mark.parametrize(
    ("head_dim", "changes", "kernels"),
    [
        (64, {}, 3),
        (128, {"attention_soft_cap": 30.0, "layer_pattern": ("sliding", "full"), "sliding_window": 128}, 6),
    ],
)
def test_the_gradient_of_a_model_compiles_with_the_kernel(head_dim, changes, kernels):
    pytest.importorskip("libtpu", reason="needs the [tpu] extra")
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), list(devices))
    config = ModelConfig(1024, 256, 2, 4, 2, head_dim, 512, compute_dtype="bfloat16", **changes)
    model = Model(config, ActivationConstraint(mesh))
    assert choose_implementation(config, model.constrain) == "splash"
    shardings = tree_shardings(model.abstract(), model.logical_axes(), mesh)
    params = jax.tree.map(
        lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), model.abstract(), shardings
    )
    tokens = jax.ShapeDtypeStruct((4, 600), jnp.int32, sharding=batch_sharding(mesh))  # 600: filled up to 640

    def total(params, tokens):
        return model.hidden(params, tokens).astype(jnp.float32).sum()

    text = jax.jit(jax.grad(total)).lower(params, tokens).compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') >= kernels  # forward, dq, dkv of each kind of layer

"""Mixtures of experts: no token is dropped, tokens are independent, experts over the mesh, the load-balancing loss.

The layer itself is compared with a float64 loop in test_decoder_oracle.py.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import learn
from rlhf_jax.batches import TokenBatch
from rlhf_jax.models import Model, sequence_logprobs_and_router_loss
from rlhf_jax.models.moe import Routing, load_balancing_loss
from rlhf_jax.parallel import ActivationConstraint, to_global, tree_shardings
from rlhf_jax.testing import mesh_of, random_params, tiny_config

EXPERTS = {"num_experts": 4, "experts_per_token": 2, "expert_ffn_size": 16, "router_coefficient": 0.5}


def tokens_of(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 64, shape).astype(np.int32)


def test_the_load_balancing_loss_by_hand() -> None:
    """Two layers, two tokens, three experts, two choices each; the mask removes the second token from both layers.

    Counted: token 0 of both layers. Choices: experts 0, 1 and 0, 2, so f = (2, 1, 1) / 2; P = mean of (.6, .3, .1) and
    (.5, .1, .4) = (.55, .2, .25). 3 (1 x .55 + .5 x .2 + .5 x .25) = 2.325.
    """
    picked = jnp.array([[[[0, 1], [1, 2]]], [[[0, 2], [2, 1]]]])
    probabilities = jnp.array([[[[0.6, 0.3, 0.1], [0.0, 0.5, 0.5]]], [[[0.5, 0.1, 0.4], [0.1, 0.4, 0.5]]]])
    routing = Routing(picked, probabilities)
    assert float(load_balancing_loss(routing, jnp.array([[True, False]]))) == pytest.approx(2.325, abs=1e-6)
    # both tokens: f = (2, 3, 3) / 4, P = (.3, .325, .375), 3 (.5 x .3 + .75 x .325 + .75 x .375) = 2.025
    assert float(load_balancing_loss(routing, jnp.array([[True, True]]))) == pytest.approx(2.025, abs=1e-6)
    assert float(load_balancing_loss(routing, jnp.array([[False, False]]))) == 0.0


def test_equal_loads_give_the_choices_per_token() -> None:
    """E experts, each with T / E choices per token and probability 1 / E: E x E x (T / E) x (1 / E) = T."""
    picked = jnp.array([[[[0, 1], [2, 3]]]])
    routing = Routing(picked, jnp.full((1, 1, 2, 4), 0.25))
    assert float(load_balancing_loss(routing, jnp.ones((1, 2), bool))) == pytest.approx(2.0)


def test_no_token_is_dropped_under_equal_choices() -> None:
    """A token's logits do not depend on the load of its experts: one row alone and among 31 copies."""
    model = Model(tiny_config(**EXPERTS))
    params = random_params(model, 0)
    row = tokens_of(0, 1, 6)
    alone = jax.jit(model.apply)(params, row)
    among = jax.jit(model.apply)(params, np.concatenate([np.repeat(row, 31, axis=0), tokens_of(1, 1, 6)]))
    np.testing.assert_allclose(among[:31], np.repeat(alone, 31, axis=0), rtol=1e-5, atol=1e-5)


def loss_and_gradients(model: Model, params, batch: TokenBatch):
    loss = learn.make_sft_loss(functools.partial(sequence_logprobs_and_router_loss, model))

    @jax.jit
    def run(params, batch):
        def total(params):
            terms, _ = loss(params, {}, batch, jax.random.key(0))
            return sum(term.coefficient * term.total / term.weight for term in terms.values()), terms

        return jax.value_and_grad(total, has_aux=True)(params)

    return run(params, batch)


def token_batch(rows: int = 8) -> TokenBatch:
    lengths = np.arange(rows) % 4 + 5
    real = np.arange(8) < lengths[:, None]
    positions = np.where(real, np.arange(8), 0).astype(np.int32)
    return TokenBatch(np.where(real, tokens_of(2, rows, 8), 0), positions, real.astype(np.int32), real)


@pytest.mark.parametrize(
    "sizes",
    [
        {"expert": 4, "tensor": 2},
        pytest.param({"expert": 2, "fsdp": 2, "sequence": 2}, marks=pytest.mark.slow),
        pytest.param({"fsdp": 4, "tensor": 2}, marks=pytest.mark.slow),
        pytest.param({"data": 2, "fsdp": 2, "expert": 2}, marks=pytest.mark.slow),
        pytest.param({"data": 4, "sequence": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_experts_over_the_mesh(sizes: dict[str, int]) -> None:
    """Experts are split over the expert axis (their width over fsdp, their columns over tensor).

    Losses, also the routers', and gradients equal those of one device, and tokens stay independent.
    """
    mesh = mesh_of(**sizes)
    model = Model(tiny_config(**EXPERTS), ActivationConstraint(mesh))
    params = random_params(model, 0)
    spread = jax.device_put(params, tree_shardings(model.abstract(), model.logical_axes(), mesh))
    experts, fsdp, tensor = (mesh.shape[axis] for axis in ("expert", "fsdp", "tensor"))
    parts = {name: spread["layers"]["mlp"][name].addressable_shards[0].data.shape for name in ("gate", "down")}
    assert parts["gate"] == (2, 4 // experts, 16 // fsdp, 16 // tensor)
    assert parts["down"] == (2, 4 // experts, 16 // tensor, 16 // fsdp)
    (one, _), alone = loss_and_gradients(Model(model.config), params, token_batch())
    (eight, _), together = loss_and_gradients(model, spread, to_global(token_batch(), mesh))
    assert float(eight) == pytest.approx(float(one), rel=1e-5)
    for first, second in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
        scale = np.abs(first).max()
        assert scale > 1e-6
        np.testing.assert_allclose(second, first, rtol=0, atol=1e-5 * scale)


def test_all_tokens_to_the_experts_of_one_device() -> None:
    """A router that sends everything to experts 0 and 1, which one device of four holds: nothing is dropped."""
    mesh = mesh_of(expert=4, tensor=2)
    model = Model(tiny_config(**EXPERTS, num_layers=1), ActivationConstraint(mesh))
    params = random_params(model, 0)
    params["embed"]["embedding"] = np.abs(params["embed"]["embedding"])
    params["layers"]["mlp_norm"]["scale"] = np.full_like(params["layers"]["mlp_norm"]["scale"], 1.0)
    params["layers"]["attention"]["output"]["kernel"] *= 0.0
    params["layers"]["mlp"]["router"] = np.repeat(np.array([[[3.0, 2.0, -3.0, -3.0]]], np.float32), 16, axis=1)
    spread = jax.device_put(params, tree_shardings(model.abstract(), model.logical_axes(), mesh))
    tokens = tokens_of(0, 8, 6)
    alone = jax.jit(Model(model.config).apply)(params, tokens)
    together = jax.jit(model.apply)(spread, to_global(tokens, mesh))
    np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-5)


def test_sft_adds_the_routers_loss_without_padding() -> None:
    model = Model(tiny_config(**EXPERTS))
    params, batch = random_params(model, 0), token_batch()
    (_, terms), gradients = loss_and_gradients(model, params, batch)
    value = float(terms["router"].total / terms["router"].weight)
    assert terms["router"].weight == (batch.segment_ids > 0).sum()
    assert (
        0.5 * 2 * 0.9 < value < 0.5 * 2 * 4 / 2
    )  # coefficient x (T for equal loads ... E T / T when two experts have all tokens)
    dirty = batch.replace(tokens=np.where(batch.segment_ids > 0, batch.tokens, 9))
    assert float(loss_and_gradients(model, params, dirty)[0][1]["router"].total) == pytest.approx(
        float(terms["router"].total), rel=1e-6
    )
    without = Model(model.config.replace(router_coefficient=0.0))
    (_, silent), other_gradients = loss_and_gradients(without, params, batch)
    assert float(silent["router"].total) == 0.0
    router, plain = (tree["layers"]["mlp"]["router"] for tree in (gradients, other_gradients))
    assert np.abs(router - plain).max() > 1e-4

"""Mixture of experts without dropping: every token is processed by all experts that its router selected.

Letters in shapes: N tokens, D hidden size, E experts, T experts per token, F width of an expert.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int32

from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.layout import Constrain, axis_names, reduce_scatter
from rlhf_jax.models.weights import Matrix, precision_of, random_matrix


@struct.dataclass
class Routing:
    """The decisions of a router. picked: int32 [B, S, T], the experts of each token; probabilities: float32 [B, S, E]."""

    picked: Int32[Array, "B S T"]
    probabilities: Float[Array, "B S E"]


class Experts(nnx.Module):
    """Router (softmax over all experts in float32, the T largest selected) and gated feed-forward experts.

    The tokens are sorted by expert and multiplied group by group (`jax.lax.ragged_dot`): there is no capacity, so
    nothing is dropped and a token's result does not depend on its neighbours.
    """

    def __init__(self, config: ModelConfig, activation: Callable[[Array], Array], *, rngs: nnx.Rngs):
        d, e, f = config.hidden_size, config.num_experts, config.expert_ffn_size
        self.router = Matrix(random_matrix(config, (d, e), d, rngs), sharding_names=("embed", "expert_logits"))
        inner, outer = ("experts", "expert_embed", "expert_mlp"), ("experts", "expert_mlp", "expert_embed")
        self.gate = Matrix(random_matrix(config, (e, d, f), d, rngs), sharding_names=inner)
        self.up = Matrix(random_matrix(config, (e, d, f), d, rngs), sharding_names=inner)
        self.down = Matrix(random_matrix(config, (e, f, d), f, rngs), sharding_names=outer)
        self._config, self._activation = config, activation

    def __call__(self, x: Float[Array, "B S D"], constrain: Constrain) -> tuple[Float[Array, "B S D"], Routing]:
        config = self._config
        router = self.router[...].astype(jnp.float32)
        logits = jnp.einsum("bsd,de->bse", x.astype(jnp.float32), router, precision="highest")
        probabilities = jax.nn.softmax(logits, axis=-1)
        weights, picked = jax.lax.top_k(probabilities, config.experts_per_token)  # [B, S, T]
        if config.normalize_expert_weights:
            weights = weights / weights.sum(axis=-1, keepdims=True)
        kernels = [kernel[...].astype(config.dtype) for kernel in (self.gate, self.up, self.down)]
        mixture = functools.partial(apply_experts, activation=self._activation, precision=precision_of(config))
        if constrain.mesh is None or constrain.mesh.size == 1:
            out = mixture(x, picked, weights, *kernels)
        else:
            out = _apply_over_mesh(mixture, x, picked, weights, *kernels, constrain=constrain, mesh=constrain.mesh)
        return out.astype(x.dtype), Routing(picked, probabilities)


def apply_experts(
    x: Float[Array, "B S D"],
    picked: Int32[Array, "B S T"],
    weights: Float[Array, "B S T"],
    gate: Float[Array, "E D F"],
    up: Float[Array, "E D F"],
    down: Float[Array, "E F D"],
    *,
    activation: Callable[[Array], Array],
    precision: jax.lax.Precision | None,
    first: Array | int = 0,
) -> Float[Array, "B S D"]:
    """Return what the experts ``first`` ... first + E - 1 add to each token, float32.

    That is the sum, over the selected experts among them, of weight * down(act(gate x) * up x). Other experts add
    nothing.
    """
    rows, choices, experts = x.reshape(-1, x.shape[-1]), picked.shape[-1], gate.shape[0]
    local_expert = picked.reshape(-1) - first
    is_local = (local_expert >= 0) & (local_expert < experts)
    local_expert = jnp.where(is_local, local_expert, experts)  # experts of other devices come last, after every group
    order = jnp.argsort(local_expert, stable=True)  # slots (token, choice) by expert
    sizes = jnp.bincount(local_expert, length=experts + 1)[:experts].astype(jnp.int32)
    grouped = jnp.take(rows, order // choices, axis=0)

    def multiply(rows: Array, kernels: Array) -> Array:
        return jax.lax.ragged_dot(rows, kernels, sizes, precision=precision)

    out = multiply(activation(multiply(grouped, gate)) * multiply(grouped, up), down)
    back = jnp.argsort(order)  # slot -> its row in ``out``
    slots = jnp.where(is_local[:, None], jnp.take(out, back, axis=0), 0).reshape(-1, choices, out.shape[-1])
    summed = jnp.einsum("ntd,nt->nd", slots.astype(jnp.float32), weights.reshape(-1, choices), precision="highest")
    return summed.reshape(x.shape)


def _apply_over_mesh(
    mixture: Callable[..., Array],
    x: Array,
    picked: Array,
    weights: Array,
    *kernels: Array,
    constrain: Constrain,
    mesh: Mesh,
) -> Array:
    """Run `apply_experts` as a shard_map island: each device has all columns of its own experts and every token that may need them.

    The tokens of the devices along the expert axis are gathered, each device adds the outputs of its experts, and the
    sums are scattered back: there is no capacity, whatever the routers select. Kernels that fsdp splits are gathered
    whole, as in other layers.
    """
    batch, columns, _ = constrain.spec(("act_batch", "act_length", "act_embed"), x.shape)
    inner = constrain.spec(("experts", "act_embed", "expert_mlp"), kernels[0].shape)
    holders, splits = axis_names(inner[0]), axis_names(inner[2])
    shared = tuple(axis for axis in holders if axis in axis_names(batch))
    rows, outer = PartitionSpec(batch, columns, None), PartitionSpec(inner[0], inner[2], None)

    def local(x: Array, picked: Array, weights: Array, *kernels: Array) -> Array:
        for axis in shared:
            x, picked, weights = (jax.lax.all_gather(array, axis, tiled=True) for array in (x, picked, weights))
        first = jax.lax.axis_index(holders) * kernels[0].shape[0] if holders else 0
        out = mixture(x, picked, weights, *kernels, first=first)
        if sums := tuple(axis for axis in (*holders, *splits) if axis not in shared):
            out = jax.lax.psum(out, sums)
        for axis in reversed(shared):
            out = reduce_scatter(out, axis, mesh)
        return out

    island = jax.shard_map(local, mesh=mesh, in_specs=(rows, rows, rows, inner, inner, outer), out_specs=rows)
    summed: Array = island(x, picked, weights, *kernels)
    return summed


def load_balancing_loss(routing: Routing, counts: Array) -> Float[Array, ""]:
    """Return E * sum over experts of f P (Fedus et al. 2021, eq. 4-6).

    f: the tokens that selected the expert, per token; P: its mean probability; both over the tokens where ``counts``
    (bool [B, S]) is True and over all layers at once. Equal loads give T.
    routing: leaves stacked over layers, [L, B, S, ...]. With T > 1 choices per token f sums to T, as in transformers.
    """
    experts = routing.probabilities.shape[-1]
    weight = jnp.broadcast_to(counts.astype(jnp.float32), routing.probabilities.shape[:-1])
    total = jnp.maximum(weight.sum(), 1.0)
    picks = jax.nn.one_hot(routing.picked, experts, dtype=jnp.float32).sum(axis=-2)  # [L, B, S, E]
    loads = jnp.einsum("lbse,lbs->e", picks, weight, precision="highest") / total
    means = jnp.einsum("lbse,lbs->e", routing.probabilities, weight, precision="highest") / total
    return experts * jnp.sum(loads * means)

"""Mixture of experts without dropping: every token reaches all the experts that its router picked.

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
from rlhf_jax.models.layout import Constrain, axis_names, scattered_sum
from rlhf_jax.models.weights import Matrix, drawn, precision_of


@struct.dataclass
class Routing:
    """What a router did. picked: int32 [B, S, T], the experts of each token; probabilities: float32 [B, S, E]."""

    picked: Int32[Array, "B S T"]
    probabilities: Float[Array, "B S E"]


class Experts(nnx.Module):
    """Router (softmax over all experts in float32, the T largest taken) and gated feed-forward experts.

    The tokens are sorted by expert and multiplied group by group (`jax.lax.ragged_dot`): no capacity, so nothing is
    dropped and a token's result does not depend on its neighbours.
    """

    def __init__(self, config: ModelConfig, activation: Callable[[Array], Array], *, rngs: nnx.Rngs):
        d, e, f = config.hidden_size, config.num_experts, config.expert_ffn_size
        self.router = Matrix(drawn(config, (d, e), d, rngs), sharding_names=("embed", "expert_logits"))
        inner, outer = ("experts", "expert_embed", "expert_mlp"), ("experts", "expert_mlp", "expert_embed")
        self.gate = Matrix(drawn(config, (e, d, f), d, rngs), sharding_names=inner)
        self.up = Matrix(drawn(config, (e, d, f), d, rngs), sharding_names=inner)
        self.down = Matrix(drawn(config, (e, f, d), f, rngs), sharding_names=outer)
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
        mixture = functools.partial(mixed, activation=self._activation, precision=precision_of(config))
        if constrain.mesh is None or constrain.mesh.size == 1:
            out = mixture(x, picked, weights, *kernels)
        else:
            out = _over_mesh(mixture, x, picked, weights, *kernels, constrain=constrain, mesh=constrain.mesh)
        return out.astype(x.dtype), Routing(picked, probabilities)


def mixed(
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
    """What the experts ``first`` ... first + E - 1 add to each token, float32: sum over its picks among them of weight *
    down(act(gate x) * up x). Picks of other experts add nothing."""
    rows, choices, experts = x.reshape(-1, x.shape[-1]), picked.shape[-1], gate.shape[0]
    here = picked.reshape(-1) - first
    ours = (here >= 0) & (here < experts)
    here = jnp.where(ours, here, experts)  # those of others come last, behind every group
    order = jnp.argsort(here, stable=True)  # slots (token, choice) by expert
    sizes = jnp.bincount(here, length=experts + 1)[:experts].astype(jnp.int32)
    grouped = jnp.take(rows, order // choices, axis=0)

    def multiply(rows: Array, kernels: Array) -> Array:
        return jax.lax.ragged_dot(rows, kernels, sizes, precision=precision)

    out = multiply(activation(multiply(grouped, gate)) * multiply(grouped, up), down)
    back = jnp.argsort(order)  # slot -> its row in ``out``
    slots = jnp.where(ours[:, None], jnp.take(out, back, axis=0), 0).reshape(-1, choices, out.shape[-1])
    summed = jnp.einsum("ntd,nt->nd", slots.astype(jnp.float32), weights.reshape(-1, choices), precision="highest")
    return summed.reshape(x.shape)


def _over_mesh(
    mixture: Callable[..., Array],
    x: Array,
    picked: Array,
    weights: Array,
    *kernels: Array,
    constrain: Constrain,
    mesh: Mesh,
) -> Array:
    """`mixed` as a shard_map island: each device has all columns of its own experts, and sees every token that may need them.

    The tokens of the devices along the expert axis are gathered, each device adds what its experts give, and the sums are
    scattered back: no capacity, whatever the routers pick. Kernels that fsdp splits arrive whole, as they do everywhere.
    """
    batch, columns, _ = constrain.spec(("act_batch", "act_length", "act_embed"), x.shape)
    inner = constrain.spec(("experts", "act_embed", "expert_mlp"), kernels[0].shape)
    holders, splits = axis_names(inner[0]), axis_names(inner[2])
    shared = tuple(axis for axis in holders if axis in axis_names(batch))
    rows, outer = PartitionSpec(batch, columns, None), PartitionSpec(inner[0], inner[2], None)

    def local(x: Array, picked: Array, weights: Array, *kernels: Array) -> Array:
        for axis in shared:
            x, picked, weights = (jax.lax.all_gather(each, axis, tiled=True) for each in (x, picked, weights))
        first = jax.lax.axis_index(holders) * kernels[0].shape[0] if holders else 0
        out = mixture(x, picked, weights, *kernels, first=first)
        if sums := tuple(axis for axis in (*holders, *splits) if axis not in shared):
            out = jax.lax.psum(out, sums)
        for axis in reversed(shared):
            out = scattered_sum(out, axis, mesh)
        return out

    island = jax.shard_map(local, mesh=mesh, in_specs=(rows, rows, rows, inner, inner, outer), out_specs=rows)
    summed: Array = island(x, picked, weights, *kernels)
    return summed


def load_balancing_loss(routing: Routing, counts: Array) -> Float[Array, ""]:
    """E * sum over experts of f P (Fedus et al. 2021, eq. 4-6): f the tokens that picked the expert per token, P its mean
    probability, over the tokens where ``counts`` (bool [B, S]) and all layers at once. Equal loads give T.

    routing: leaves stacked over layers, [L, B, S, ...]. With T > 1 picks per token f sums to T, as in transformers.
    """
    experts = routing.probabilities.shape[-1]
    weight = jnp.broadcast_to(counts.astype(jnp.float32), routing.probabilities.shape[:-1])
    total = jnp.maximum(weight.sum(), 1.0)
    picks = jax.nn.one_hot(routing.picked, experts, dtype=jnp.float32).sum(axis=-2)  # [L, B, S, E]
    loads = jnp.einsum("lbse,lbs->e", picks, weight, precision="highest") / total
    means = jnp.einsum("lbse,lbs->e", routing.probabilities, weight, precision="highest") / total
    return experts * jnp.sum(loads * means)

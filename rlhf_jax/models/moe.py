"""Mixture of experts without dropping: every token reaches all the experts that its router picked.

Letters in shapes: N tokens, D hidden size, E experts, T experts per token, F width of an expert.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jaxtyping import Array, Float, Int32

from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.weights import drawn, precision_of


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
        self.router = nnx.Param(drawn(config, (d, e), d, rngs), sharding_names=("embed", "expert_logits"))
        inner, outer = ("experts", "expert_embed", "expert_mlp"), ("experts", "expert_mlp", "expert_embed")
        self.gate = nnx.Param(drawn(config, (e, d, f), d, rngs), sharding_names=inner)
        self.up = nnx.Param(drawn(config, (e, d, f), d, rngs), sharding_names=inner)
        self.down = nnx.Param(drawn(config, (e, f, d), f, rngs), sharding_names=outer)
        self._config, self._activation = config, activation

    def __call__(self, x: Float[Array, "B S D"]) -> tuple[Float[Array, "B S D"], Routing]:
        config = self._config
        rows = x.reshape(-1, x.shape[-1])  # [N, D]
        logits = jnp.einsum(
            "nd,de->ne", rows.astype(jnp.float32), self.router[...].astype(jnp.float32), precision="highest"
        )
        probabilities = jax.nn.softmax(logits, axis=-1)
        weights, picked = jax.lax.top_k(probabilities, config.experts_per_token)  # [N, T]
        if config.normalize_expert_weights:
            weights = weights / weights.sum(axis=-1, keepdims=True)
        order = jnp.argsort(picked.reshape(-1), stable=True)  # slots (token, choice) by expert
        sizes = jnp.bincount(picked.reshape(-1), length=config.num_experts).astype(jnp.int32)
        grouped = jnp.take(rows, order // config.experts_per_token, axis=0)
        inner = self._activation(self._multiply(grouped, self.gate, sizes)) * self._multiply(grouped, self.up, sizes)
        out = self._multiply(inner, self.down, sizes)
        back = jnp.argsort(order)  # slot -> its row in ``out``
        slots = jnp.take(out, back, axis=0).reshape(-1, config.experts_per_token, out.shape[-1])
        mixed = jnp.einsum("ntd,nt->nd", slots.astype(jnp.float32), weights, precision="highest")
        routing = Routing(picked.reshape(*x.shape[:2], -1), probabilities.reshape(*x.shape[:2], -1))
        return mixed.astype(x.dtype).reshape(x.shape), routing

    def _multiply(self, rows: Array, kernels: nnx.Param[Array], sizes: Array) -> Array:
        """Each group of rows with its expert's matrix."""
        matrices = kernels[...].astype(self._config.dtype)
        return jax.lax.ragged_dot(rows, matrices, sizes, precision=precision_of(self._config))


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

"""Several passes over one rollout: epochs of shuffled minibatches in one scan, for PPO and GRPO."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array

from rlhf_jax import ops
from rlhf_jax.errors import InputError
from rlhf_jax.types import Mean, Params, Rng, TrainState, TrainStep


class EpochsConfig(Protocol):
    """The fields of PPOConfig and GRPOConfig that `run_epochs` reads. coefficients: of the terms of the loss."""

    @property
    def epochs(self) -> int: ...
    @property
    def minibatches(self) -> int: ...
    @property
    def coefficients(self) -> dict[str, float]: ...


def _pooled_loss(metrics: dict[str, Mean], config: EpochsConfig) -> Mean:
    """Return the loss from the means of its terms. A term with weight 0 adds 0, as in the step."""
    parts = [(coefficient, metrics[f"loss/{name}"]) for name, coefficient in config.coefficients.items()]
    values = [coefficient * mean.total / jnp.where(mean.weight > 0, mean.weight, 1.0) for coefficient, mean in parts]
    return Mean(jnp.stack(values).sum(), jnp.ones(()))


def minibatch_indices(rng: Rng, rows: int, config: EpochsConfig) -> Array:
    """Return a new permutation of the rows for every epoch, int32 [epochs * minibatches, rows / minibatches]."""
    if rows % config.minibatches:
        name = f"{type(config).__name__}.minibatches"
        raise InputError(f"a rollout of {rows} rows does not divide into {name} = {config.minibatches}")
    ops.require_threefry("minibatch_indices", rng)
    orders = jax.vmap(lambda key: jax.random.permutation(key, rows))(jax.random.split(rng, config.epochs))
    return orders.reshape(config.epochs * config.minibatches, -1).astype(jnp.int32)


def run_epochs(
    train_step: TrainStep,
    state: TrainState,
    batch: Any,
    rows: int,
    rng: Rng,
    config: EpochsConfig,
    frozen: Params | None = None,
    adjust: Callable[[Any], Any] | None = None,
) -> tuple[TrainState, dict[str, Mean]]:
    """Run epochs x minibatches of ``train_step`` in one scan. frozen: its second argument, None = {}. adjust: of a minibatch.

    Metrics are summed over all of them (token means over the whole update), ``loss`` is the sum of the terms so pooled;
    ``identity/*`` are those of the first minibatch, before any step: ratio 1, approximate KL 0 and no clipping, up to rounding.
    ``identity/identity_gap`` is
    the largest |log ratio| of that minibatch (with microbatches: the sum of each one's largest, never less).
    """
    indices = minibatch_indices(rng, rows, config)

    def one(state: TrainState, places: Array) -> tuple[TrainState, dict[str, Mean]]:
        chosen = jax.tree.map(lambda x: x[places], batch)
        return train_step(state, frozen or {}, chosen if adjust is None else adjust(chosen))

    state, metrics = jax.lax.scan(one, state, indices)
    merged: dict[str, Mean] = jax.tree.map(lambda x: x.sum(axis=0), metrics)
    merged["loss"] = _pooled_loss(merged, config)
    first: dict[str, Mean] = jax.tree.map(lambda x: x[0], metrics)
    for name in ("identity_gap", "approx_kl_k2", "clip_fraction", "ratio"):
        merged[f"identity/{name}"] = first[name]
    # A maximum does not merge by addition: the mean of the microbatches' maxima would hide one bad row from the guard.
    merged["identity/identity_gap"] = Mean(first["identity_gap"].total, jnp.ones(()))
    del merged["identity_gap"]
    return state, merged

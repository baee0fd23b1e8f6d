"""The training step: loss terms in, new state out, exact under any split into microbatches."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from rlhf_jax import ops
from rlhf_jax.errors import InputError, require_whole
from rlhf_jax.types import LossFn, Mean, Params, PrepareFn, Rng, Term, TrainState, TrainStep


def initial_state(params: Params, optimizer: optax.GradientTransformation, rng: Rng) -> TrainState:
    """Step 0. rng: the run's key."""
    ops.require_threefry("initial_state", rng)
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params), rng=rng)


def _split(batch: Any, microbatches: int) -> Any:
    """Split [B, ...] into [M, B / M, ...]: microbatch m takes rows m, m + M, ..., so that every device keeps rows of each."""

    def split(x: Array) -> Array:
        if not x.ndim:
            raise InputError("batch: an array has no rows to cut; repeat a number of the whole batch for every row")
        if x.shape[0] % microbatches:
            raise InputError(f"batch of {x.shape[0]} rows does not divide into {microbatches} microbatches")
        return jnp.moveaxis(x.reshape(x.shape[0] // microbatches, microbatches, *x.shape[1:]), 1, 0)

    return jax.tree.map(split, batch)


def _whole_step_weights(loss_fn: LossFn, params: Params, frozen: Params, batches: Any, keys: Array) -> dict[str, Array]:
    """Sum the weight of each term over all microbatches.

    Weights are counts of the batch, so that the compiler drops the forward pass, whose outputs nothing reads here.
    """

    def one(_: None, inputs: tuple[Any, Array]) -> tuple[None, dict[str, Array]]:
        terms, _metrics = loss_fn(params, frozen, *inputs)
        return None, {name: term.weight for name, term in terms.items()}

    _, weights = jax.lax.scan(one, None, (batches, keys))
    return {name: weight.sum() for name, weight in weights.items()}


def gradients(
    loss_fn: LossFn, params: Params, frozen: Params, batch: Any, rng: Rng, microbatches: int
) -> tuple[Params, dict[str, Mean]]:
    """Return the gradients of ``sum of coefficient * total / weight`` (float32, a tree like params) and the metrics.

    Each weight is taken over the whole batch before any gradient is divided by it: losses per token [1, 1] and [2, 2, 2, 2] in
    two microbatches give 10 / 6 = 1.667, not the mean of means 1.5.
    """
    require_whole("microbatches", microbatches, 1)
    batches = _split(batch, microbatches)
    keys = jax.random.split(rng, microbatches)
    weights = _whole_step_weights(loss_fn, params, frozen, batches, keys)
    safe = {name: jnp.where(weight > 0, weight, 1.0) for name, weight in weights.items()}

    def loss(params: Params, one: Any, key: Rng) -> tuple[Array, tuple[dict[str, Term], dict[str, Mean]]]:
        terms, metrics = loss_fn(params, frozen, one, key)
        total = sum((term.coefficient * term.total / safe[name] for name, term in terms.items()), jnp.zeros(()))
        return total, (terms, metrics)

    def accumulate(carry: Any, inputs: tuple[Any, Array]) -> tuple[Any, Any]:
        (value, (terms, metrics)), grads = jax.value_and_grad(loss, has_aux=True)(params, *inputs)
        parts = {f"loss/{name}": Mean(term.total, term.weight) for name, term in terms.items()}
        return jax.tree.map(jnp.add, carry, jax.tree.map(lambda g: g.astype(jnp.float32), grads)), (
            value,
            parts | metrics,
        )

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
    grads, (values, metrics) = jax.lax.scan(accumulate, zeros, (batches, keys))
    summed: dict[str, Mean] = jax.tree.map(lambda x: x.sum(axis=0), metrics)
    summed["loss"] = Mean(values.sum(), jnp.ones(()))
    return grads, summed


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    microbatches: int = 1,
    prepare: PrepareFn | None = None,
) -> TrainStep:
    """Return a pure step; jit it with ``donate_argnums=0``. Metrics: ``loss``, ``loss/TERM``, ``grad_norm``, ``refused``, the
    loss's own and those of ``prepare``.

    prepare: a stage over the whole batch, before microbatches are cut: statistics and outputs of frozen models that the loss
    reads as constants. It gets a key of its own, split off the key of the step, and every array of the batch that it returns has
    rows first. None: the loss gets the batch as it comes.

    When the loss or the gradient norm is not finite, or the optimiser calls it a spike (`check_spikes`), the state comes
    back as it was (only the step has advanced) and ``refused`` is 1: nothing bad was committed, and the run's loop decides
    what follows.
    """
    require_whole("make_train_step: microbatches", microbatches, 1)
    extended = optax.with_extra_args_support(optimizer)

    def train_step(state: TrainState, frozen: Params, batch: Any) -> tuple[TrainState, dict[str, Mean]]:
        rng = jax.random.fold_in(state.rng, state.step)
        prepared: dict[str, Mean] = {}
        if prepare is not None:
            rng, prepare_rng = jax.random.split(rng)
            batch, prepared = prepare(state.params, frozen, batch, prepare_rng)
        grads, metrics = gradients(loss_fn, state.params, frozen, batch, rng, microbatches)
        norm = optax.global_norm(grads)
        metrics["grad_norm"] = Mean(norm, jnp.ones(()))
        loss = metrics["loss"].total
        updates, opt_state = extended.update(grads, state.opt_state, state.params, loss=loss)
        params = optax.apply_updates(state.params, updates)
        finite = jnp.isfinite(norm) & jnp.isfinite(loss)
        spikes = [flag for _, flag in optax.tree_utils.tree_get_all_with_path(opt_state, "refused")]
        refused = jnp.stack([~finite, *spikes]).any()
        metrics["refused"] = Mean(refused.astype(jnp.float32), jnp.ones(()))
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (params, opt_state), (state.params, state.opt_state)
        )
        state = TrainState(step=state.step + 1, params=params, opt_state=opt_state, rng=state.rng)
        return state, _joined(metrics, prepared)

    return train_step


def _joined(metrics: dict[str, Mean], prepared: dict[str, Mean]) -> dict[str, Mean]:
    """Join two mappings. Raises InputError for a name in both."""
    if twice := sorted(metrics.keys() & prepared.keys()):
        raise InputError(f"make_train_step: prepare gives the metric {twice[0]!r}, which the step has; rename it")
    return metrics | prepared

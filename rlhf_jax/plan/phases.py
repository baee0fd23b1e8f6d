"""The phases of a run as shapes: the jitted function, its arguments with their shardings, and what else lies in HBM meanwhile."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from rlhf_jax import learn, programs
from rlhf_jax.models import Model
from rlhf_jax.parallel import abstract_arrays, batch_sharding, born_abstract, remake_mesh, tree_shardings
from rlhf_jax.plan import analytic
from rlhf_jax.rollout import RolloutModels
from rlhf_jax.types import Completions, PairBatch, Params, PolicyBatch, PromptBatch, Rollout, TokenBatch


@dataclasses.dataclass(frozen=True)
class Phase:
    """One jitted function of a run. resident: everything that stays in HBM during the run, by kind, whether this phase
    reads it or not. tokens: that the phase reads or writes in one call, padding included. flops: of the model, all chips
    together, by `plan.analytic`. inside: bytes a chip within the temporaries, by kind, by `plan.analytic`. decoding: the most
    that a sampling loop runs."""

    name: str
    function: Any
    arguments: tuple[Any, ...]
    resident: Mapping[str, Any]
    tokens: int
    flops: int
    inside: Mapping[str, int | None]
    decoding: int = 1


def _rows(mesh: Mesh, dtype: Any, *shape: int) -> Any:
    struct: Any = jax.ShapeDtypeStruct
    return struct(shape, dtype, sharding=batch_sharding(mesh))


def token_batch(mesh: Mesh, rows: int, length: int) -> TokenBatch:
    """As `data.token_batches` makes them."""
    ids, flags = _rows(mesh, jnp.int32, rows, length), _rows(mesh, jnp.bool_, rows, length)
    return TokenBatch(ids, ids, ids, flags)


def prompt_batch(mesh: Mesh, rows: int, length: int) -> PromptBatch:
    """As `data.prompt_batches` makes them."""
    each = _rows(mesh, jnp.int32, rows)
    return PromptBatch(_rows(mesh, jnp.int32, rows, length), _rows(mesh, jnp.bool_, rows, length), each, each)


def _rng() -> Any:
    return jax.eval_shape(lambda: jax.random.key(0, impl="threefry2x32"))


def _shards(mesh: Mesh) -> int:
    spec = batch_sharding(mesh).spec[0]
    axes = (spec,) if isinstance(spec, str) else spec
    size = 1
    for axis in axes:
        size *= mesh.shape[axis]
    return size


def supervised_phases(
    stage: str,
    model: Model,
    params: Params,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    rows: int,
    length: int,
    microbatches: int,
    centring: float = 0.0,
) -> list[Phase]:
    """Training step and evaluation of "sft" or "reward" (rows are pairs then). params: shapes with shardings."""
    shardings = programs.placed(params)
    state = born_abstract(lambda p: learn.initial_state(p, optimizer, jax.random.key(0)), shardings, mesh, params)
    batch: Any = token_batch(mesh, rows, length)
    if stage == "sft":
        functions = programs.sft_functions(model, optimizer, state, mesh, microbatches=microbatches)
    else:
        functions = programs.reward_functions(
            model, optimizer, state, mesh, microbatches=microbatches, centring=centring
        )
        batch = PairBatch(batch, batch, _rows(mesh, jnp.float32, rows))
    sequences = rows if stage == "sft" else 2 * rows
    forward = analytic.forward_flops(model.config, sequences, length, length)
    held = max(1, sequences // _shards(mesh) // microbatches)
    inside = {"activations": analytic.saved_bytes(model.config, held, length)}
    resident = {"parameters": state.params, "optimizer": (state.opt_state, state.step, state.rng)}
    tokens = sequences * length
    return [
        Phase(f"{stage} step", functions.train_step, (state, {}, batch), resident, tokens, 3 * forward, inside),
        Phase(f"{stage} evaluate", functions.evaluate, (state.params, batch, {}), resident, tokens, forward, {}),
    ]


def ppo_phases(
    models: RolloutModels,
    frozen: dict[str, Params | None],
    state: learn.PPOState,
    functions: programs.PPOFunctions,
    settings: programs.PPOSettings,
    mesh: Mesh,
    *,
    rows: int,
    prompt_length: int,
) -> list[Phase]:
    """The four of an iteration. frozen, state: shapes with shardings."""
    sampling, ppo, slots, microbatches = settings.sampling, settings.ppo, settings.slots, settings.microbatches
    rollout_mesh = None if settings.rollout_mesh is None else remake_mesh(settings.rollout_mesh, mesh)
    params, train = state.train.params, state.train
    new, rng = sampling.max_new_tokens, _rng()
    prompts = prompt_batch(mesh, rows, prompt_length)

    def produced(function: Callable[..., Any], *arguments: Any) -> Any:
        made = jax.eval_shape(function, *arguments)
        return jax.tree.map(lambda leaf: _rows(mesh, leaf.dtype, *leaf.shape), made)

    completions: Completions = produced(functions.generate, params, prompts, rng, frozen)
    scored: Rollout = produced(functions.score, params, frozen, completions)
    prepared: PolicyBatch = produced(lambda *given: functions.prepare(*given)[0], scored, state.kl_coefficient)

    resident = {
        "parameters": params,
        "optimizer": (train.opt_state, train.step, train.rng, state.kl_coefficient, state.iteration),
        "frozen models": frozen,
    }
    length, shards = prompt_length + new, _shards(mesh)
    tokens = rows * length
    config = models.policy.config
    passes = {
        "policy": analytic.forward_flops(config, rows, length, new),
        "reference": analytic.forward_flops(models.reference.config, rows, length, new),
    }
    if models.value is not None:
        passes["value"] = analytic.forward_flops(models.value.config, rows, length, new)
    trained = passes["policy"] + passes.get("value", 0)
    if models.reward is not None:
        passes["reward"] = analytic.forward_flops(models.reward.config, rows, length, length)
    held = max(1, rows // shards // ppo.minibatches // microbatches)
    saved = [analytic.saved_bytes(m.config, held, length) for m in (models.policy, models.value) if m is not None]
    kept = None if None in saved else sum(filter(None, saved))
    sampled_on = mesh if rollout_mesh is None else rollout_mesh
    heads = sampled_on.shape["tensor"] if config.num_kv_heads % sampled_on.shape["tensor"] == 0 else 1
    inside: dict[str, int | None] = {
        "KV cache": analytic.cache_bytes(config, slots.slots or rows, length) // (_shards(sampled_on) * heads)
    }
    if rollout_mesh is not None:
        copied = jax.eval_shape(
            lambda tree: programs.rollout_copy(models.policy, tree, rollout_mesh)[1], params["policy"]
        )
        owner = models.policy
        where = tree_shardings(owner.abstract(), owner.logical_axes(), rollout_mesh)
        inside["rollout copy"] = analytic.tree_bytes(abstract_arrays(copied, where))
    generated = analytic.generate_flops(config, rows, prompt_length, new)
    return [
        Phase("generate", functions.generate, (params, prompts, rng, frozen), resident, tokens, generated, inside, new),
        Phase("score", functions.score, (params, frozen, completions), resident, tokens, sum(passes.values()), {}),
        Phase("prepare", functions.prepare, (scored, state.kl_coefficient), resident, tokens, 0, {}),
        Phase(
            "update",
            functions.update,
            (train, prepared, rng, frozen),
            resident,
            tokens * ppo.epochs,
            3 * trained * ppo.epochs,
            {"activations": kept},
        ),
    ]

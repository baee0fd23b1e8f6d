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
from rlhf_jax.models import Model, lora
from rlhf_jax.models.attention import chosen
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


def _gradients(params: Params) -> int:
    """Bytes a chip: float32, laid out as the parameters."""
    structs = jax.tree.map(lambda p: _float32(p.shape, p.sharding), params)
    return analytic.tree_bytes(structs)


def _float32(shape: tuple[int, ...], sharding: Any) -> Any:
    struct: Any = jax.ShapeDtypeStruct
    return struct(shape, jnp.float32, sharding=sharding)


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
    frozen: Params | None = None,
) -> list[Phase]:
    """Training step and evaluation of "sft" or "reward" (rows are pairs then). params, frozen (the base of adapters, {} for
    none): shapes with shardings."""
    frozen = frozen or {}
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
    forward = analytic.model_flops(model, sequences, length, length)
    trained = analytic.training_flops(model, sequences, length, length)
    held = max(1, sequences // _shards(mesh) // microbatches)
    inside = {"gradients": _gradients(state.params), "activations": analytic.saved_bytes(model.config, held, length)}
    resident = {"parameters": state.params, "optimizer": (state.opt_state, state.step, state.rng)}
    if frozen:
        resident["frozen base"] = frozen
    tokens = sequences * length
    return [
        Phase(f"{stage} step", functions.train_step, (state, frozen, batch), resident, tokens, trained, inside),
        Phase(f"{stage} evaluate", functions.evaluate, (state.params, batch, frozen), resident, tokens, forward, {}),
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
    scorers = [(models.policy, new), (models.reference, new), (models.value, new), (models.reward, length)]
    scoring = sum(analytic.model_flops(one, rows, length, read) for one, read in scorers if one is not None)
    learners = [one for one in (models.policy, models.value) if one is not None]
    training = sum(analytic.training_flops(one, rows, length, new) for one in learners)
    held = max(1, rows // shards // ppo.minibatches // microbatches)
    saved = [analytic.saved_bytes(one.config, held, length) for one in learners]
    kept = None if None in saved else sum(filter(None, saved))
    sampled_on = mesh if rollout_mesh is None else rollout_mesh
    heads = sampled_on.shape["tensor"] if config.num_kv_heads % sampled_on.shape["tensor"] == 0 else 1
    inside: dict[str, int | None] = {
        "KV cache": analytic.cache_bytes(config, slots.slots or rows, length) // (_shards(sampled_on) * heads)
    }
    if rollout_mesh is not None:
        copied = jax.eval_shape(
            lambda *trees: programs.rollout_copy(models.policy, lora.whole(*trees)["policy"], rollout_mesh)[1],
            params,
            frozen,
        )
        owner = models.policy
        where = tree_shardings(owner.abstract(), owner.logical_axes(), rollout_mesh)
        inside["rollout copy"] = analytic.tree_bytes(abstract_arrays(copied, where))
    splash = chosen(config, models.policy.constrain)
    generated = analytic.generate_flops(config, rows, prompt_length, new, splash)
    generated += 2 * tokens * analytic.adapter_weights(models.policy)
    return [
        Phase("generate", functions.generate, (params, prompts, rng, frozen), resident, tokens, generated, inside, new),
        Phase("score", functions.score, (params, frozen, completions), resident, tokens, scoring, {}),
        Phase("prepare", functions.prepare, (scored, state.kl_coefficient), resident, tokens, 0, {}),
        Phase(
            "update",
            functions.update,
            (train, prepared, rng, frozen),
            resident,
            tokens * ppo.epochs,
            training * ppo.epochs,
            {"gradients": _gradients(params), "activations": kept},
        ),
    ]

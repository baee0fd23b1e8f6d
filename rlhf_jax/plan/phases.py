"""The phases of a run as shapes: the jitted function, its arguments with their shardings, and what else lies in HBM meanwhile."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from rlhf_jax import learn
from rlhf_jax.algorithms import programs
from rlhf_jax.algorithms.scoring import RolloutModels
from rlhf_jax.batches import PairBatch, PromptBatch, TokenBatch
from rlhf_jax.models import Model, lora
from rlhf_jax.parallel import (
    ActivationConstraint,
    abstract_arrays,
    batch_sharding,
    born_abstract,
    remake_mesh,
    tree_shardings,
)
from rlhf_jax.plan import analytic, memory
from rlhf_jax.types import Completions, Params, Rollout, TrainState


@dataclasses.dataclass(frozen=True)
class Phase:
    """One jitted function of a run. resident: everything that lies in HBM meanwhile, by kind, whether this phase reads it
    or not. tokens: that the phase reads or writes in one call, padding included. flops: of the model, all chips
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

    @property
    def analytic(self) -> int:
        """Bytes a chip, without compiling: what stays, and what is known of the temporaries."""
        return memory.tree_bytes(dict(self.resident)) + sum(size for size in self.inside.values() if size)


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
    return ActivationConstraint(mesh).parts("act_batch")


PASSING = "gathered weights, one block, logits or head"


def _learning(found: memory.Learning, copied: int = 0) -> dict[str, int | None]:
    """By kind. copied: `memory.copied_bytes`, when the step is in a loop."""
    parts: dict[str, int | None] = {"gradients": found.gradients, "activations": found.activations}
    return parts | {"casts and copies": found.casts + copied, PASSING: found.passing}


def supervised_phases(
    model: Model,
    params: Params,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    rows: int,
    length: int,
    microbatches: int,
    frozen: Params | None = None,
    centring: float | None = None,
    dpo: learn.DPOConfig | None = None,
    reference: Model | None = None,
) -> list[Phase]:
    """Training step and evaluation of SFT, with ``centring`` of the reward model, with ``dpo`` and its ``reference`` model
    of DPO (rows are pairs in the last two). params, frozen (as train_step takes it, {} for none): shapes with shardings."""
    frozen = frozen or {}
    shardings = programs.placed(params)
    state = born_abstract(lambda p: learn.initial_state(p, optimizer, jax.random.key(0)), shardings, mesh, params)
    split: dict[str, Any] = {"microbatches": microbatches}
    if dpo is not None:
        assert reference is not None
        stage, functions = "dpo", programs.dpo_functions(model, reference, optimizer, state, mesh, **split, dpo=dpo)
    elif centring is not None:
        stage = "reward"
        functions = programs.reward_functions(model, optimizer, state, mesh, **split, centring=centring)
    else:
        stage, functions = "sft", programs.sft_functions(model, optimizer, state, mesh, **split)
    one = token_batch(mesh, rows, length)
    batch: Any = one if stage == "sft" else PairBatch(one, one, _rows(mesh, jnp.float32, rows))
    sequences = rows if stage == "sft" else 2 * rows
    referred = 0 if reference is None else analytic.model_flops(reference, sequences, length, length)
    forward = analytic.model_flops(model, sequences, length, length) + referred
    trained = analytic.training_flops(model, sequences, length, length) + referred
    held = max(1, sequences // _shards(mesh) // microbatches)
    learning = _learning(memory.learning([model], state.params, mesh.shape, microbatches, held, length, length))
    scored = max(1, sequences // _shards(mesh))
    passing = {PASSING: memory.scoring_bytes([(model, length)], scored, length, mesh.shape)}
    resident = {"parameters": state.params, "optimizer": (state.opt_state, state.step, state.rng)}
    if frozen:
        resident["frozen models"] = frozen
    tokens = sequences * length
    return [
        Phase(f"{stage} step", functions.train_step, (state, frozen, batch), resident, tokens, trained, learning),
        Phase(
            f"{stage} evaluate", functions.evaluate, (state.params, batch, frozen), resident, tokens, forward, passing
        ),
    ]


def rollout_phases(
    models: RolloutModels,
    frozen: dict[str, Params | None],
    state: learn.PPOState | TrainState,
    functions: programs.PPOFunctions,
    settings: programs.PPOSettings | programs.GRPOSettings,
    mesh: Mesh,
    *,
    rows: int,
    prompt_length: int,
    offload: bool = False,
    ahead: bool = False,
) -> list[Phase]:
    """The four of an iteration of PPO or GRPO. frozen, state: shapes with shardings. rows: responses. offload: the
    optimiser's state lies with the hosts except in the update (`programs.asleep`). ahead: with one_step_off the next rollout
    is sampled beside the present one, which waits for its rewards, and itself waits from then on."""
    sampling, slots, microbatches = settings.sampling, settings.slots, settings.microbatches
    algorithm = settings.ppo if isinstance(settings, programs.PPOSettings) else settings.grpo
    train, controller = (state.train, (state.kl_coefficient,)) if isinstance(state, learn.PPOState) else (state, ())
    rollout_mesh = None if settings.rollout_mesh is None else remake_mesh(settings.rollout_mesh, mesh)
    params = train.params
    new, rng = sampling.max_new_tokens, _rng()
    prompts = prompt_batch(mesh, rows, prompt_length)

    def produced(function: Callable[..., Any], *arguments: Any) -> Any:
        made = jax.eval_shape(function, *arguments)
        return jax.tree.map(lambda leaf: _rows(mesh, leaf.dtype, *leaf.shape), made)

    completions: Completions = produced(functions.generate, params, prompts, rng, frozen)
    scored: Rollout = produced(functions.score, params, frozen, completions)
    prepared = produced(lambda *given: functions.prepare(*given)[0], scored, *controller)

    resident: dict[str, Any] = {
        "parameters": params,
        "optimizer": (train.opt_state, train.step, train.rng, *controller),
        "frozen models": frozen,
    }
    if ahead:
        # Arrays of its own, beside those that a phase reads: memory is counted by identity.
        resident["other rollout"] = jax.tree.map(copy.copy, completions)
    still = {kind: tree for kind, tree in resident.items() if not (offload and kind == "optimizer")}
    length, shards = prompt_length + new, _shards(mesh)
    tokens = rows * length
    config = models.policy.config
    scorers = [(models.policy, new), (models.reference, new), (models.value, new), (models.reward, length)]
    scoring = sum(analytic.model_flops(one, rows, length, read) for one, read in scorers if one is not None)
    learners = [one for one in (models.policy, models.value) if one is not None]
    training = sum(analytic.training_flops(one, rows, length, new) for one in learners)
    held = max(1, rows // shards // algorithm.minibatches // microbatches)
    read = [(one, columns) for one, columns in scorers if one is not None]
    scored_bytes = memory.scoring_bytes(read, max(1, rows // shards), length, mesh.shape)
    learnt = memory.learning(learners, params, mesh.shape, microbatches, held, length, new)
    sampled_on = mesh if rollout_mesh is None else rollout_mesh
    heads = sampled_on.shape["tensor"] if config.num_kv_heads % sampled_on.shape["tensor"] == 0 else 1
    sampled = _shards(sampled_on)
    inside: dict[str, int | None] = {
        "KV cache": memory.cache_bytes(config, slots.slots or rows, length) // (sampled * heads),
        PASSING: memory.block_bytes(
            models.policy, max(1, rows // sampled), prompt_length, sampled_on.shape, backward=False
        ),
    }
    if rollout_mesh is not None:
        copied = jax.eval_shape(
            lambda *trees: programs.rollout_copy(models.policy, lora.whole(*trees)["policy"], rollout_mesh)[1],
            params,
            frozen,
        )
        owner = models.policy
        where = tree_shardings(owner.abstract(), owner.logical_axes(), rollout_mesh)
        inside["rollout copy"] = memory.tree_bytes(abstract_arrays(copied, where))
    attention = analytic.attention_of(models.policy)
    generated = analytic.generate_flops(config, rows, prompt_length, new, attention)
    generated += 2 * tokens * analytic.adapter_weights(models.policy)
    beside = still | {"other rollout": scored} if ahead else still
    return [
        Phase("generate", functions.generate, (params, prompts, rng, frozen), beside, tokens, generated, inside, new),
        Phase("score", functions.score, (params, frozen, completions), still, tokens, scoring, {PASSING: scored_bytes}),
        Phase("prepare", functions.prepare, (scored, *controller), still, tokens, 0, {}),
        Phase(
            "update",
            functions.update,
            (train, prepared, rng, frozen),
            resident,
            tokens * algorithm.epochs,
            training * algorithm.epochs,
            _learning(learnt, memory.copied_bytes((params, train.opt_state))),
        ),
    ]

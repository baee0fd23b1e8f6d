"""The jitted functions of every training experiment, made in one place: an experiment runs them, the planner compiles them.

Whoever plans a run must lower the very functions of the run, with its shardings and its donation; so neither side builds
its own. State and batches may be arrays (a run) or ShapeDtypeStructs with shardings (a plan).

Outputs are pinned: rows over the batch axes, numbers on all devices, a new state where the old one was. Left to the
compiler, a state could come back laid out otherwise: no donation, and a second compilation at the second step.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from rlhf_jax import learn, rollout
from rlhf_jax.algorithms import scoring
from rlhf_jax.algorithms.scoring import RolloutModels, RolloutParams, policy_and_values
from rlhf_jax.batches import PairBatch, TokenBatch
from rlhf_jax.models import (
    Fold,
    Model,
    lora,
    policy_logprobs,
    sequence_logprobs,
    sequence_logprobs_and_router_loss,
    sequence_scores,
)
from rlhf_jax.parallel import (
    ActivationConstraint,
    MeshConfig,
    batch_sharding,
    mesh_between,
    remake_mesh,
    replicated,
    tree_shardings,
)
from rlhf_jax.types import LossFn, Params, Rng, Term, TrainState


class SupervisedFunctions(NamedTuple):
    """train_step(state, frozen, batch, fold=) -> (state, metrics), the state donated; fold: static, how rows of
    different lengths are read (`models.folding`). evaluate(params, batch, frozen) -> the terms of the training loss on a
    batch, {name: Term}; of pairs (terms, (chosen, rejected)), the rewards, of DPO the implicit ones, float32 [B] each.
    params: what is trained; frozen: {"base": ...} with adapters (`models.lora`), of DPO also {"reference": ...}."""

    train_step: Callable[..., Any]
    evaluate: Callable[..., Any]


PairEvaluation = tuple[dict[str, Term], tuple[jax.Array, jax.Array]]
"""(terms of the loss, (rewards of the chosen replies, of the rejected ones))."""


def placed(tree: Any) -> Any:
    """The sharding of every leaf."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def asleep(state: TrainState) -> TrainState:
    """``state`` with its optimiser's part in the memory of the hosts: HBM for a rollout. What was on the devices is freed
    with ``state``."""
    shardings = jax.tree.map(lambda where: where.with_memory_kind("pinned_host"), placed(state.opt_state))
    return state.replace(opt_state=jax.device_put(state.opt_state, shardings))  # type: ignore[no-any-return,attr-defined]


def awake(state: TrainState, home: Any) -> TrainState:
    """What `asleep` gave, back on the devices. home: `placed` of its optimiser's part there."""
    return state.replace(opt_state=jax.device_put(state.opt_state, home))  # type: ignore[no-any-return,attr-defined]


def sft_functions(
    model: Model, optimizer: optax.GradientTransformation, state: TrainState, mesh: Mesh, *, microbatches: int
) -> SupervisedFunctions:
    """Of supervised fine-tuning."""

    def loss(fold: Fold | None) -> LossFn:
        return sft_loss(model.folded(fold))

    def evaluate(params: Params, tokens: TokenBatch, frozen: Params | None = None) -> dict[str, Term]:
        return loss(None)(lora.whole(params, frozen), {}, tokens, jax.random.key(0))[0]  # the loss draws nothing

    train_step = _train_step(loss, model.lora, optimizer, state, mesh, microbatches)
    return SupervisedFunctions(train_step, jax.jit(evaluate, out_shardings=replicated(mesh)))


def sft_loss(model: Model) -> LossFn:
    """Of the training step, over parameters that are whole (`models.lora.whole`)."""
    return learn.make_sft_loss(_policy_logprobs(model))


def reward_functions(
    model: Model,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    mesh: Mesh,
    *,
    microbatches: int,
    centring: float,
) -> SupervisedFunctions:
    """Of the pairwise reward model. centring: weight of (chosen + rejected)^2."""

    def loss(fold: Fold | None) -> LossFn:
        return reward_loss(model.folded(fold), centring)

    def evaluate(params: Params, pairs: PairBatch, frozen: Params | None = None) -> PairEvaluation:
        scores = learn.pair_scores(functools.partial(sequence_scores, model), lora.whole(params, frozen), pairs)
        return learn.reward_terms(*scores, pairs, centring), scores

    train_step = _train_step(loss, model.lora, optimizer, state, mesh, microbatches)
    return SupervisedFunctions(train_step, jax.jit(evaluate, out_shardings=replicated(mesh)))


def reward_loss(model: Model, centring: float) -> LossFn:
    """As `sft_loss`, of the reward model."""
    return learn.make_reward_loss(functools.partial(sequence_scores, model), centring=centring)


def dpo_functions(
    model: Model,
    reference: Model,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    mesh: Mesh,
    *,
    microbatches: int,
    dpo: learn.DPOConfig,
) -> SupervisedFunctions:
    """Of direct preference optimisation. reference: with adapters the base itself (`algorithms.models.Loaded.base`)."""

    def evaluate(params: Params, pairs: PairBatch, frozen: Params) -> PairEvaluation:
        terms_of = learn.make_dpo_terms(_policy_logprobs(model), _reference_logprobs(reference), dpo)
        terms, rewards, _ = terms_of(lora.whole(params, frozen), frozen, pairs)
        half = rewards.shape[0] // 2
        return terms, (rewards[:half], rewards[half:])

    def loss(fold: Fold | None) -> LossFn:
        return dpo_loss(model.folded(fold), reference.folded(fold), dpo)

    train_step = _train_step(loss, model.lora, optimizer, state, mesh, microbatches)
    return SupervisedFunctions(train_step, jax.jit(evaluate, out_shardings=replicated(mesh)))


def dpo_loss(model: Model, reference: Model, dpo: learn.DPOConfig) -> LossFn:
    """As `sft_loss`, of DPO."""
    return learn.make_dpo_loss(_policy_logprobs(model), _reference_logprobs(reference), dpo)


def _policy_logprobs(model: Model) -> Callable[[Params, TokenBatch], tuple[jax.Array, ...]]:
    """What a supervised loss reads of the model that is trained; with experts also the loss of their routers."""
    routed = model.config.router_coefficient > 0
    return functools.partial(sequence_logprobs_and_router_loss if routed else sequence_logprobs, model)


def _reference_logprobs(reference: Model) -> Callable[[Params, TokenBatch], jax.Array]:
    def logprobs(frozen: Params, tokens: TokenBatch) -> jax.Array:
        return sequence_logprobs(reference, frozen["reference"], tokens)[0]

    return logprobs


def _train_step(
    loss: Callable[[Fold | None], LossFn],
    adapters: lora.LoraConfig | None,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    mesh: Mesh,
    microbatches: int,
) -> Callable[..., Any]:
    """loss: over whole parameters, of rows read so (`models.folding`; None: as they come)."""

    def train_step(state: TrainState, frozen: Params, batch: Any, fold: Fold | None = None) -> Any:
        whole = lora.on_adapters(loss(fold), adapters)
        return learn.make_train_step(whole, optimizer, microbatches=microbatches)(state, frozen, batch)

    placement = (placed(state), replicated(mesh))
    return jax.jit(train_step, static_argnames="fold", donate_argnums=0, out_shardings=placement)


# ---- PPO


class PPOFunctions(NamedTuple):
    """The four of an iteration. params: what is trained, {"policy"[, "value"]}; frozen: {"reference", "reward"}, with
    adapters also {"base": {"policy"[, "value"]}}.

    generate(params, prompts, rng, frozen) -> Completions. score(params, frozen, completions, fold=) -> Rollout.
    prepare(rollout, kl_coefficient) -> (PolicyBatch, metrics). update(train state, batch, rng, frozen, fold=) -> (state,
    metrics), the state donated. fold: static, how rows of different lengths are read (`models.folding`).
    """

    generate: Callable[..., Any]
    score: Callable[..., Any]
    prepare: Callable[..., Any]
    update: Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class PPOSettings:
    """Everything that decides PPO's programs besides its models. steps: iterations. share_trunk: the value head stands on
    the policy's trunk. rollout_mesh: the run's devices in another shape, for sampling: see `rollout_copy`."""

    steps: int
    sampling: rollout.SamplingConfig
    ppo: learn.PPOConfig
    policy_optimizer: learn.OptimizerConfig
    value_optimizer: learn.OptimizerConfig
    microbatches: int = 1
    slots: rollout.SlotConfig = rollout.ALL_AT_ONCE
    share_trunk: bool = False
    rollout_mesh: MeshConfig | None = None


def matrices_of(models: RolloutModels) -> Params:
    """`Model.matrices` of what a rollout's update can train, {"policy"[, "value"]}."""
    value = {} if models.value is None else {"value": models.value.matrices()}
    return {"policy": models.policy.matrices(), **value}


def ppo_optimizer(settings: PPOSettings, models: RolloutModels) -> optax.GradientTransformation:
    """One optimiser for the policy's leaves, one for the value model's."""
    updates, matrices = settings.ppo.epochs * settings.ppo.minibatches, matrices_of(models)
    each = {"policy": settings.policy_optimizer, "value": settings.value_optimizer}
    optimizers = {
        name: learn.make_optimizer(config, settings.steps, updates, matrices=matrices) for name, config in each.items()
    }
    return optax.partition(optimizers, learn.ppo_optimizer_labels)


def ppo_beginning(
    optimizer: optax.GradientTransformation, settings: PPOSettings, rng: Rng
) -> Callable[[Params], learn.PPOState]:
    """trainable parameters -> the state at step 0. rng: the run's key. A value head on the policy's trunk begins with every
    value 0 (Ziegler et al. 2019)."""

    def begin(params: Params) -> learn.PPOState:
        if settings.share_trunk:
            head = jax.tree.map(jnp.zeros_like, params["policy"]["scalar_head"])
            params = params | {"policy": params["policy"] | {"scalar_head": head}}
        train = learn.initial_state(params, optimizer, rng)
        return learn.PPOState(train, jnp.asarray(settings.ppo.kl_coefficient, jnp.float32))

    return begin


def ppo_functions(
    models: RolloutModels,
    optimizer: optax.GradientTransformation,
    state: learn.PPOState,
    mesh: Mesh,
    settings: PPOSettings,
    ends: dict[str, Any],
) -> PPOFunctions:
    """Of PPO. ends: ``eos_ids``, ``pad_id`` and, with stop strings, ``stop_table`` of the rollout."""
    ppo, rows, everywhere = settings.ppo, batch_sharding(mesh), replicated(mesh)

    def prepare(scored: Any, coefficient: jax.Array) -> Any:
        return learn.prepare(scored, ppo, coefficient)

    def update(
        train: TrainState, prepared: Any, rng: Rng, frozen: Params | None = None, fold: Fold | None = None
    ) -> Any:
        loss = lora.on_adapters(ppo_loss(models.folded(fold), settings), None)  # no dropout: the first ratio must be 1
        train_step = learn.make_train_step(loss, optimizer, microbatches=settings.microbatches)
        return learn.update(train_step, train, prepared, rng, ppo, frozen)

    return PPOFunctions(
        jax.jit(_generate(models, settings, mesh, ends), out_shardings=rows),
        jax.jit(_score(models, settings, ppo), static_argnames="fold", out_shardings=rows),
        jax.jit(prepare, out_shardings=(rows, everywhere)),
        jax.jit(update, static_argnames="fold", donate_argnums=0, out_shardings=(placed(state.train), everywhere)),
    )


def _generate(
    models: RolloutModels, settings: PPOSettings | GRPOSettings, mesh: Mesh, ends: dict[str, Any]
) -> Callable[..., Any]:
    rollout_mesh = None if settings.rollout_mesh is None else remake_mesh(settings.rollout_mesh, mesh)

    def generate(params: Params, prompts: Any, rng: Rng, frozen: Params | None = None) -> Any:
        sampler, policy = models.policy, lora.whole(params, frozen)["policy"]
        if rollout_mesh is not None:
            sampler, policy = rollout_copy(sampler, policy, rollout_mesh)
        options = {"sampling": settings.sampling, "slots": settings.slots, **ends}
        return rollout.generate(sampler, policy, prompts, rng, **options)

    return generate


def _score(
    models: RolloutModels, settings: PPOSettings | GRPOSettings, config: learn.PPOConfig | learn.GRPOConfig
) -> Callable[..., Any]:
    def score(params: Params, frozen: Params, completions: Any, fold: Fold | None = None) -> Any:
        both = lora.whole(params, frozen)
        four = RolloutParams(both["policy"], frozen["reference"], both.get("value"), frozen["reward"])
        return scoring.score(
            models.folded(fold),
            four,
            completions,
            temperature=settings.sampling.temperature,
            sampler_logprobs=config.old_logprobs == "sampler",
        )

    return score


def ppo_loss(models: RolloutModels, settings: PPOSettings) -> LossFn:
    """Of the update, over parameters that are whole (`models.lora.whole`)."""

    def policy_fn(params: Params, completions: Any) -> Any:
        return policy_and_values(
            models, params["policy"], params.get("value"), completions, temperature=settings.sampling.temperature
        )

    return learn.make_ppo_loss(policy_fn, settings.ppo)


# ---- GRPO


@dataclasses.dataclass(frozen=True)
class GRPOSettings:
    """Everything that decides GRPO's programs besides its models. samples: responses a prompt. The rest: `PPOSettings`."""

    steps: int
    samples: int
    sampling: rollout.SamplingConfig
    grpo: learn.GRPOConfig
    optimizer: learn.OptimizerConfig
    microbatches: int = 1
    slots: rollout.SlotConfig = rollout.ALL_AT_ONCE
    rollout_mesh: MeshConfig | None = None


def grpo_optimizer(settings: GRPOSettings, models: RolloutModels) -> optax.GradientTransformation:
    """Of the policy."""
    updates = settings.grpo.epochs * settings.grpo.minibatches
    return learn.make_optimizer(settings.optimizer, settings.steps, updates, matrices=matrices_of(models))


def grpo_functions(
    models: RolloutModels,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    mesh: Mesh,
    settings: GRPOSettings,
    ends: dict[str, Any],
) -> PPOFunctions:
    """Of GRPO, as PPO's but ``prepare(rollout) -> (GroupBatch, metrics)``; params are {"policy"}."""
    grpo, rows, everywhere = settings.grpo, batch_sharding(mesh), replicated(mesh)

    def prepare(scored: Any) -> Any:
        return learn.prepare_groups(scored, grpo, settings.samples)

    def update(
        train: TrainState, prepared: Any, rng: Rng, frozen: Params | None = None, fold: Fold | None = None
    ) -> Any:
        loss = lora.on_adapters(grpo_loss(models.folded(fold), settings), None)  # no dropout, as in PPO
        train_step = learn.make_train_step(loss, optimizer, microbatches=settings.microbatches)
        return learn.update_groups(train_step, train, prepared, rng, grpo, frozen)

    return PPOFunctions(
        jax.jit(_generate(models, settings, mesh, ends), out_shardings=rows),
        jax.jit(_score(models, settings, grpo), static_argnames="fold", out_shardings=rows),
        jax.jit(prepare, out_shardings=(rows, everywhere)),
        jax.jit(update, static_argnames="fold", donate_argnums=0, out_shardings=(placed(state), everywhere)),
    )


def grpo_loss(models: RolloutModels, settings: GRPOSettings) -> LossFn:
    """Of the update, over parameters that are whole (`models.lora.whole`)."""

    def logprobs(params: Params, completions: Any) -> Any:
        policy, temperature = params["policy"], settings.sampling.temperature
        return policy_logprobs(models.policy, policy, completions, temperature=temperature)

    return learn.make_grpo_loss(logprobs, settings.grpo)


def rollout_copy(model: Model, params: Params, mesh: Mesh) -> tuple[Model, Params]:
    """The model and its parameters as they lie on ``mesh``, matrices in the dtype they are multiplied in: call it under jit.

    Parameters that training splits over fsdp would be gathered for every token; here they are gathered once a rollout.
    The dtype is the one every product casts to anyway, so tokens and log-probabilities stay the same.
    """
    here = model.constrain.mesh if isinstance(model.constrain, ActivationConstraint) else mesh
    stops = [stop for stop in (mesh_between(here, mesh), mesh) if stop is not None]
    model = dataclasses.replace(model, constrain=ActivationConstraint(mesh))
    shardings = [tree_shardings(model.abstract(), model.logical_axes(), stop) for stop in stops]

    def copy(path: Any, leaf: jax.Array, *way: Any) -> jax.Array:
        names = [key.key for key in path]
        if names[-1] in ("kernel", "embedding") and "scalar_head" not in names and leaf.dtype != jnp.int8:
            leaf = leaf.astype(model.config.dtype)
        for sharding in way:
            leaf = jax.lax.with_sharding_constraint(leaf, sharding)
        return leaf

    return model, jax.tree_util.tree_map_with_path(copy, params, *shardings)

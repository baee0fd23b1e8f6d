"""The models of PPO with their state and functions, for a run or as shapes for a plan."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from rlhf_jax.algorithms.models import (
    Loaded,
    adapted,
    load_model,
    load_reward,
    refuse_tokenizer,
    set_pad_token,
    source_generation,
    with_adapters,
    with_base_dtype,
)
from rlhf_jax.algorithms.programs import (
    GRPOSettings,
    PPOFunctions,
    PPOSettings,
    grpo_functions,
    grpo_optimizer,
    ppo_beginning,
    ppo_functions,
    ppo_optimizer,
)
from rlhf_jax.algorithms.scoring import RolloutModels
from rlhf_jax.data import Form, Template, sampler_ends
from rlhf_jax.errors import InputError
from rlhf_jax.io import describe_pretrained, locate
from rlhf_jax.io.source import ModelSource
from rlhf_jax.learn import PPOState, initial_state
from rlhf_jax.models import Head, LoraConfig, Model
from rlhf_jax.parallel import ActivationConstraint, abstract_arrays, born_sharded, tree_shardings
from rlhf_jax.storage.inputs import Input
from rlhf_jax.types import Params, Rng, TrainState


@dataclasses.dataclass(frozen=True)
class Cast:
    """policy: as it was loaded. trainable: {"policy"[, "value"]}; frozen: {"reference", "reward"}, with adapters also
    {"base": {"policy"[, "value"]}}, of which the policy's is the reference itself and the value's the reward model's trunk.
    """

    policy: Loaded
    judge: Loaded | None
    models: RolloutModels
    trainable: Params
    frozen: dict[str, Any]

    @property
    def inputs(self) -> list[Input]:
        """For `open_run`."""
        return [*self.policy.as_inputs("policy"), *(self.judge.as_inputs("reward") if self.judge else [])]

    def refuse_other_template(self, template: Template) -> None:
        """Raises InputError when policy or reward model learned from conversations that ``template`` writes otherwise."""
        used = Form(template, self.policy.tokenizer)
        self.policy.refuse_other_template(used, responses=False)
        if self.judge is not None:
            self.judge.refuse_other_template(used, responses=True)

    def refuse_longer(self, tokens: int, what: str) -> None:
        """As `Loaded.refuse_longer`, for every model (a value model is as long as what it started from)."""
        for each in filter(None, (self.policy, self.judge)):
            each.refuse_longer(tokens, what)


def load_cast(
    policy: ModelSource,
    reward: ModelSource | None,
    share_trunk: bool,
    mesh: Mesh,
    rng: Rng,
    *,
    lora: LoraConfig | None = None,
    critic: bool = True,
    reference: bool = True,
    load: Callable[..., Loaded] = load_model,
    load_judge: Callable[..., Loaded] = load_reward,
) -> Cast:
    """Policy, frozen reference (a real copy), reward model, value model (from the reward model, else the policy's trunk).

    load, load_judge: `plan_model` and `plan_judge` give the cast as shapes.
    """
    if lora is not None and lora.dropout:
        raise InputError(
            "LoraConfig.dropout: rollouts are scored without it, so that PPO's first ratio would not be 1; set 0"
        )
    actor = with_adapters(load(policy, "lm+scalar" if share_trunk else "lm", mesh, rng), lora, mesh, rng)
    anchor = None
    if reference:
        anchor = actor.base("lm") if lora is not None else load(policy, "lm", mesh, rng)
    judge = None if reward is None else load_judge(reward, mesh)
    if judge is not None and lora is not None:
        judge = with_base_dtype(judge, lora, mesh)  # the base of the value model too: one copy
    valuer = None
    if critic and not share_trunk:
        start = judge if lora is not None and judge is not None else load(reward or policy, "scalar", mesh, rng)
        valuer = with_adapters(start, lora, mesh, jax.random.fold_in(rng, 1))
    for other in filter(None, (judge, valuer)):
        if other.tokenizer.get_vocab() != actor.tokenizer.get_vocab():
            raise InputError(f"{other.input}: its tokenizer is not the policy's; train both from one base model")
    trainable = {"policy": actor.params} | ({} if valuer is None else {"value": valuer.params})
    models = RolloutModels(actor.model, *(None if each is None else each.model for each in (anchor, valuer, judge)))
    frozen: dict[str, Any] = {
        "reference": None if anchor is None else anchor.params,
        "reward": None if judge is None else judge.params,
    }
    if lora is not None:
        owners = {"policy": actor} | ({} if valuer is None else {"value": valuer})
        frozen["base"] = {name: owner.frozen["base"] for name, owner in owners.items()}
    return Cast(actor, judge, models, trainable, frozen)


def assemble(
    cast: Cast,
    settings: PPOSettings,
    template: Template,
    mesh: Mesh,
    rng: Rng,
    *,
    born: Callable[..., PPOState] = born_sharded,
) -> tuple[PPOState, PPOFunctions]:
    """PPO's state at step 0 and the four functions of an iteration. template: of the prompts, it says what ends a reply.
    rng: the run's key. born: `parallel.born_abstract` for a plan."""
    optimizer = ppo_optimizer(settings, cast.models)
    state = born(ppo_beginning(optimizer, settings, rng), _shardings(cast, mesh), mesh, cast.trainable)
    ends = _ends(cast, template, settings)
    return state, ppo_functions(cast.models, optimizer, state, mesh, settings, ends)


def assemble_grpo(
    cast: Cast,
    settings: GRPOSettings,
    template: Template,
    mesh: Mesh,
    rng: Rng,
    *,
    born: Callable[..., TrainState] = born_sharded,
) -> tuple[TrainState, PPOFunctions]:
    """As `assemble`, of GRPO."""
    optimizer = grpo_optimizer(settings, cast.models)
    begin = functools.partial(initial_state, optimizer=optimizer, rng=rng)
    state = born(begin, _shardings(cast, mesh), mesh, cast.trainable)
    ends = _ends(cast, template, settings)
    return state, grpo_functions(cast.models, optimizer, state, mesh, settings, ends)


def _shardings(cast: Cast, mesh: Mesh) -> Params:
    """Of what is trained."""
    owners = {"policy": cast.models.policy, "value": cast.models.value}
    return {
        name: tree_shardings(owner.abstract(), owner.logical_axes(), mesh)
        for name, owner in owners.items()
        if name in cast.trainable and owner is not None
    }


def _ends(cast: Cast, template: Template, settings: PPOSettings | GRPOSettings) -> dict[str, Any]:
    vocabulary = cast.models.policy.config.vocab_size
    policy = cast.policy
    return sampler_ends(policy.tokenizer, template, settings.sampling.stop_strings, vocabulary, policy.generation)


def plan_model(source: ModelSource, head: Head, mesh: Mesh, rng: Rng | None = None) -> Loaded:
    """As `load_model`, with ShapeDtypeStructs on their shards for parameters: nothing is read but headers, nothing drawn."""
    del rng
    generation: dict[str, Any] = {}
    if source.config is not None:
        config, tokenizer = source.config.replace(head=head), source.tokenizer
    else:
        assert source.path is not None
        saved, tokenizer = describe_pretrained(source.path, max_length=source.max_length)
        config = adapted(saved.replace(head=head, param_dtype=source.param_dtype or saved.param_dtype), source)
        set_pad_token(tokenizer, source)
        generation = source_generation(config, locate(source.path), source.path)
    refuse_tokenizer(config, tokenizer, source.path)
    model = Model(config, ActivationConstraint(mesh))
    shardings = tree_shardings(model.abstract(), model.logical_axes(), mesh)
    params = abstract_arrays(model.abstract(), shardings)
    return Loaded(model, params, tokenizer, source.path, generation=generation)


def plan_judge(source: ModelSource, mesh: Mesh) -> Loaded:
    """As `load_reward`, see `plan_model`; a new model will do."""
    return plan_model(source, "scalar", mesh)

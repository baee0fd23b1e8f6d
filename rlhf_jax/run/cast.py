"""The models of PPO, loaded for a run or as shapes for a plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from jax.sharding import Mesh

from rlhf_jax.io import describe_pretrained
from rlhf_jax.models import Head, Model
from rlhf_jax.parallel import ActivationConstraint, abstract_arrays, tree_shardings
from rlhf_jax.rollout import RolloutModels
from rlhf_jax.run.configurables import Loaded, ModelSource, adapted, load_model, load_reward, refuse_tokenizer
from rlhf_jax.run.provenance import Input
from rlhf_jax.types import InputError, Params, Rng


@dataclasses.dataclass(frozen=True)
class Cast:
    """policy: as it was loaded. trainable: {"policy"[, "value"]}; frozen: {"reference", "reward"}."""

    policy: Loaded
    judge: Loaded | None
    models: RolloutModels
    trainable: Params
    frozen: dict[str, Params | None]

    @property
    def inputs(self) -> list[Input]:
        """For `open_run`."""
        return [*self.policy.as_inputs("policy"), *(self.judge.as_inputs("reward") if self.judge else [])]

    def shardings(self, mesh: Mesh) -> Params:
        """Of ``trainable``."""
        owners = {"policy": self.models.policy, "value": self.models.value}
        return {
            name: tree_shardings(owner.abstract(), owner.logical_axes(), mesh)
            for name, owner in owners.items()
            if name in self.trainable and owner is not None
        }

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
    load: Callable[..., Loaded] = load_model,
    load_judge: Callable[..., Loaded] = load_reward,
) -> Cast:
    """Policy, frozen reference (a real copy), reward model, value model (from the reward model, else the policy's trunk).

    load, load_judge: `plan_model` and `plan_judge` give the cast as shapes.
    """
    actor = load(policy, "lm+scalar" if share_trunk else "lm", mesh, rng)
    reference = load(policy, "lm", mesh, rng)
    judge = None if reward is None else load_judge(reward, mesh)
    critic = None if share_trunk else load(reward or policy, "scalar", mesh, rng)
    for other in filter(None, (judge, critic)):
        if other.tokenizer.get_vocab() != actor.tokenizer.get_vocab():
            raise InputError(f"{other.input}: its tokenizer is not the policy's; train both from one base model")
    trainable = {"policy": actor.params} | ({} if critic is None else {"value": critic.params})
    models = RolloutModels(
        actor.model, reference.model, None if critic is None else critic.model, None if judge is None else judge.model
    )
    frozen = {"reference": reference.params, "reward": None if judge is None else judge.params}
    return Cast(actor, judge, models, trainable, frozen)


def plan_model(source: ModelSource, head: Head, mesh: Mesh, rng: Rng | None = None) -> Loaded:
    """As `load_model`, with ShapeDtypeStructs on their shards for parameters: nothing is read but headers, nothing drawn."""
    del rng
    if source.config is not None:
        config, tokenizer = source.config.replace(head=head), source.tokenizer
    else:
        assert source.path is not None
        saved, tokenizer = describe_pretrained(source.path)
        config = adapted(saved.replace(head=head, param_dtype=source.param_dtype or saved.param_dtype), source)
    refuse_tokenizer(config, tokenizer)
    model = Model(config, ActivationConstraint(mesh))
    shardings = tree_shardings(model.abstract(), model.logical_axes(), mesh)
    return Loaded(model, abstract_arrays(model.abstract(), shardings), tokenizer, source.path)


def plan_judge(source: ModelSource, mesh: Mesh) -> Loaded:
    """As `load_reward`, see `plan_model`; a new model will do."""
    return plan_model(source, "scalar", mesh)

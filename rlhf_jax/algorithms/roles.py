"""The models of PPO and GRPO by role: policy, value, reference, reward."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from rlhf_jax.algorithms.build import Setting
from rlhf_jax.algorithms.models import Loaded, with_adapters, with_base_dtype
from rlhf_jax.data import Form, Template, sampler_ends
from rlhf_jax.errors import InputError
from rlhf_jax.io.source import ModelSource
from rlhf_jax.models import LoraConfig, Model, lora
from rlhf_jax.parallel import tree_shardings
from rlhf_jax.storage.inputs import Input
from rlhf_jax.types import Params


@dataclasses.dataclass(frozen=True)
class Roles:
    """The models of a run by role.

    policy, reward: as they were loaded. models: by role. trainable: parameters by role, {"policy"[, "value"]}. frozen: parameters
    of
    "reference" and "reward" where they exist; with adapters also {"base": {"policy"[, "value"]}}, where the base of the policy is
    the
    reference itself and the base of the value model is the trunk of the reward model.
    """

    policy: Loaded
    reward: Loaded | None
    models: Mapping[str, Model]
    trainable: Params
    frozen: dict[str, Any]

    @property
    def loaded(self) -> dict[str, Loaded]:
        """The models that were read from a source, by role."""
        return {"policy": self.policy} | ({} if self.reward is None else {"reward": self.reward})

    @property
    def inputs(self) -> list[Input]:
        """The inputs of the run, for its provenance."""
        return [entry for role, model in self.loaded.items() for entry in model.as_inputs(role)]

    def without_trainable(self) -> Roles:
        """Return the roles without the parameters that are trained, so that the state of a run holds the only copy of them."""
        trainable: dict[str, Params] = {role: {} for role in self.trainable}
        return dataclasses.replace(self, policy=self.policy.without_params(), trainable=trainable)

    def check_template(self, template: Template) -> None:
        """Check that policy and reward model were trained on conversations as ``template`` writes them.

        Raises InputError otherwise.
        """
        form = Form(template, self.policy.tokenizer)
        for role, model in self.loaded.items():
            model.check_template(form, responses=role == "reward")

    def check_max_length(self, tokens: int, keys: str) -> None:
        """Check the length of sequences for every model (`Loaded.check_max_length`)."""
        for model in self.loaded.values():
            model.check_max_length(tokens, keys)

    def shardings(self, mesh: Mesh) -> Params:
        """Return the shardings of the trainable parameters."""
        owners = {role: self.models[role] for role in self.trainable}
        return {role: tree_shardings(owner.abstract(), owner.logical_axes(), mesh) for role, owner in owners.items()}

    def matrices(self) -> Params:
        """Return `Model.matrices` of the trainable parameters."""
        return {role: self.models[role].matrices() for role in self.trainable}

    def ends(self, template: Template, stop_strings: Any) -> dict[str, Any]:
        """Return the tokens and texts that end a response, as the sampler takes them."""
        size = self.models["policy"].config.vocab_size
        return sampler_ends(self.policy.tokenizer, template, stop_strings, size, self.policy.generation)


def load_roles(
    setting: Setting,
    policy: ModelSource,
    reward: ModelSource | None,
    adapters: LoraConfig | None,
    *,
    share_trunk: bool = False,
    value: bool,
    reference: bool,
) -> Roles:
    """Load the policy, a frozen reference (a real copy; with adapters their base), the reward model, and the value model.

    share_trunk: the value head stands on the policy's trunk. value: whether there are values; a value model of its own starts from
    the reward model, without one from the policy's trunk. reference: whether there is a KL to measure.
    """
    mesh, rng, build = setting.mesh, setting.rng, setting.build
    if adapters is not None and adapters.dropout:
        raise InputError(
            "LoraConfig.dropout: rollouts are scored without it, so that PPO's first ratio would not be 1; set 0"
        )
    sampler = with_adapters(build.load(policy, "lm+scalar" if share_trunk else "lm", mesh, rng), adapters, mesh, rng)
    loaded = {"policy": sampler}
    if value and not share_trunk:
        loaded["value"] = sampler  # its place among the roles
    if reference:
        loaded["reference"] = sampler.base("lm") if adapters is not None else build.load(policy, "lm", mesh, rng)
    judge = None if reward is None else build.load_reward(reward, mesh)
    if judge is not None and adapters is not None:
        judge = with_base_dtype(judge, adapters, mesh)  # the base of the value model too: one copy
    if judge is not None:
        loaded["reward"] = judge
    if "value" in loaded:
        shared = adapters is not None and judge is not None
        start = judge if shared and judge is not None else build.load(reward or policy, "scalar", mesh, rng)
        loaded["value"] = with_adapters(start, adapters, mesh, jax.random.fold_in(rng, 1))
    for role in ("reward", "value"):
        if role in loaded and loaded[role].tokenizer.get_vocab() != sampler.tokenizer.get_vocab():
            raise InputError(f"{loaded[role].input}: its tokenizer is not the policy's; train both from one base model")
    trained = [role for role in ("policy", "value") if role in loaded]
    frozen: dict[str, Any] = {role: loaded[role].params for role in ("reference", "reward") if role in loaded}
    if adapters is not None:
        frozen["base"] = {role: loaded[role].frozen["base"] for role in trained}
    models = {role: model.model for role, model in loaded.items()}
    return Roles(sampler, judge, models, {role: loaded[role].params for role in trained}, frozen)


def parameters_by_role(params: Params, frozen: Params) -> dict[str, Params]:
    """Return whole parameters by role. params: what is trained; frozen: as of `Roles`."""
    return {**lora.whole(params, frozen), **{role: tree for role, tree in frozen.items() if role != "base"}}

"""The jitted sampler and the jitted scorer of PPO and GRPO."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from jax.sharding import Mesh

from rlhf_jax import rollout
from rlhf_jax.algorithms import scoring
from rlhf_jax.algorithms.roles import Roles, parameters_by_role
from rlhf_jax.algorithms.rollout_copy import rollout_copy
from rlhf_jax.algorithms.rollout_fields import Limits, RolloutAlgorithm
from rlhf_jax.batches import PromptBatch
from rlhf_jax.models import Fold, lora
from rlhf_jax.parallel import Jitted, batch_sharding, jitted, remake_mesh
from rlhf_jax.types import Completions, Params, Rng, Scored


class Score(Protocol):
    """(params, frozen, completions, fold=) -> `Scored`. fold: static, how rows of different lengths are read."""

    def __call__(
        self, params: Params, frozen: Params, completions: Completions, fold: Fold | None = None
    ) -> Scored: ...
    def lower(self, params: Params, frozen: Params, completions: Completions, fold: Fold | None = None) -> Any: ...


def make_generate(
    roles: Roles, algorithm: RolloutAlgorithm, mesh: Mesh, ends: Mapping[str, Any]
) -> Jitted[[Params, Params, PromptBatch, Rng], Completions]:
    """Return the jitted sampler. ends: as `Roles.ends` gives it. With a rollout
    mesh it samples on the same devices in another shape (`rollout_copy`)."""
    rollout_mesh = None if algorithm.rollout_mesh is None else remake_mesh(algorithm.rollout_mesh, mesh)
    options = {"sampling": algorithm.sampling, "slots": algorithm.slots, **ends}

    def generate(params: Params, frozen: Params, prompts: PromptBatch, rng: Rng) -> Completions:
        sampler, policy = roles.models["policy"], lora.whole(params, frozen)["policy"]
        if rollout_mesh is not None:
            sampler, policy = rollout_copy(sampler, policy, rollout_mesh)
        return rollout.generate(sampler, policy, prompts, rng, **options)

    return jitted(generate, out=batch_sharding(mesh))


def make_score(roles: Roles, algorithm: RolloutAlgorithm, limits: Limits, mesh: Mesh) -> Score:
    """Return the jitted scorer of all models."""
    settings: dict[str, Any] = {
        "temperature": algorithm.sampling.temperature,
        "sampler_logprobs": limits.old_logprobs == "sampler",
    }

    def score(params: Params, frozen: Params, completions: Completions, fold: Fold | None = None) -> Scored:
        models = scoring.folded(roles.models, fold)
        return scoring.score(models, parameters_by_role(params, frozen), completions, **settings)

    return jitted(score, out=batch_sharding(mesh), static=("fold",))

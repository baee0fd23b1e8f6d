"""Completions scored with the models of PPO and GRPO: log-probabilities, values, rewards."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array

from rlhf_jax import ops
from rlhf_jax.errors import InputError
from rlhf_jax.models import Fold, Model, as_token_batch, policy_logprobs, sequence_scores
from rlhf_jax.models.sequences import response_hidden, response_logprobs
from rlhf_jax.types import Completions, Params, Rollout


@dataclasses.dataclass(frozen=True)
class RolloutModels:
    """The four models of PPO. ``value`` None: the policy's trunk carries the value head, or with head "lm" there are no
    values (GRPO). ``reference`` None: no KL. ``reward`` None: the score comes from elsewhere and `score` leaves it 0."""

    policy: Model
    reference: Model | None
    value: Model | None
    reward: Model | None

    def folded(self, fold: Fold | None) -> RolloutModels:
        """All of them reading rows so (`Model.folded`)."""
        four = (self.policy, self.reference, self.value, self.reward)
        return RolloutModels(*(model and model.folded(fold) for model in four))  # type: ignore[arg-type]


@struct.dataclass
class RolloutParams:
    """Their parameters; None where the model is None."""

    policy: Params
    reference: Params | None
    value: Params | None
    reward: Params | None


def policy_and_values(
    models: RolloutModels,
    policy: Params,
    value: Params | None,
    completions: Completions,
    *,
    temperature: float,
) -> tuple[Array, Array, Array]:
    """(logprobs, entropy, values), float32 [B, T] each. Values are NOT masked (conventions differ in where they count):
    after the column behind the last response token, the first that could see the whole response, its value is repeated,
    because padding has no state of its own (Ziegler et al. 2019 copy the last real state there)."""
    hidden = response_hidden(models.policy, policy, completions)
    logprobs, entropy = response_logprobs(models.policy, policy, hidden, completions, temperature=temperature)
    if models.value is None:
        values = models.policy.scalars(policy, hidden)
    elif value is None:
        raise InputError("policy_and_values: RolloutModels.value is a model but its parameters are None; give them")
    else:
        values = models.value.scalars(value, response_hidden(models.value, value, completions))
    columns = jnp.arange(values.shape[1], dtype=jnp.int32)
    behind = ops.last_true_index(completions.mask)[:, None] + 1
    return logprobs, entropy, jnp.take_along_axis(values, jnp.minimum(columns, behind), axis=1)


def score(
    models: RolloutModels,
    params: RolloutParams,
    completions: Completions,
    *,
    temperature: float,
    sampler_logprobs: bool = False,
) -> Rollout:
    """Everything PPO or GRPO needs to know of completions, at the sampling temperature. Pure; jit with models and
    temperature static.

    sampler_logprobs: take the policy's log-probabilities from the sampler instead of a pass of their own; under jit that
    pass then does not exist, unless the policy's trunk carries the values. Raises InputError when exactly one of
    models.reward and params.reward is None.
    """
    if (models.reward is None) != (params.reward is None):
        raise InputError("score: give both RolloutModels.reward and RolloutParams.reward, or None for both")
    if (models.reference is None) != (params.reference is None):
        raise InputError("score: give both RolloutModels.reference and RolloutParams.reference, or None for both")
    values = None
    if models.value is None and models.policy.config.head == "lm":
        logprobs, _ = policy_logprobs(models.policy, params.policy, completions, temperature=temperature)
    else:
        logprobs, _, values = policy_and_values(
            models, params.policy, params.value, completions, temperature=temperature
        )
    if sampler_logprobs:
        logprobs = completions.logprobs
    reference = None
    if models.reference is not None and params.reference is not None:
        reference, _ = policy_logprobs(models.reference, params.reference, completions, temperature=temperature)
    scores = jnp.zeros(completions.ended.shape, jnp.float32)
    if models.reward is not None and params.reward is not None:
        scores = sequence_scores(models.reward, params.reward, as_token_batch(completions))
    return Rollout(completions=completions, logprobs=logprobs, ref_logprobs=reference, values=values, scores=scores)

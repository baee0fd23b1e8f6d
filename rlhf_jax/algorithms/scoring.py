"""Scoring completions with the models of PPO and GRPO: log-probabilities, values and rewards of models."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array

from rlhf_jax import ops
from rlhf_jax.errors import InputError
from rlhf_jax.models import Fold, Model, as_token_batch, policy_logprobs, sequence_scores
from rlhf_jax.models.sequences import response_hidden, response_logprobs
from rlhf_jax.types import Completions, Params, Scored

ROLES = ("policy", "value", "reference", "reward")
"""policy: what samples. value: absent where the policy's trunk carries the value head, and where there are no values (GRPO).
reference: absent without a KL. reward: absent where the score comes from elsewhere."""
Models = Mapping[str, Model]
"""Models by role."""


def folded(models: Models, fold: Fold | None) -> dict[str, Model]:
    """Return the models with rows folded so (`Model.folded`)."""
    return {role: model.folded(fold) for role, model in models.items()}


def policy_and_values(
    models: Models, params: Mapping[str, Params], completions: Completions, *, temperature: float
) -> tuple[Array, Array, Array]:
    """Return (logprobs, entropy, values), float32 [B, T] each.

    Values are not masked, because conventions differ in where they count. The column after the last response token is the first
    that
    sees the whole response; its value is repeated in later columns, because padding has no state of its own (Ziegler et al. 2019
    copy
    the last real state there). Raises InputError for a value model without parameters.
    """
    hidden = response_hidden(models["policy"], params["policy"], completions)
    logprobs, entropy = response_logprobs(
        models["policy"], params["policy"], hidden, completions, temperature=temperature
    )
    if "value" not in models:
        values = models["policy"].scalars(params["policy"], hidden)
    elif "value" not in params:
        raise InputError("policy_and_values: there is a value model and no parameters of it; give params['value']")
    else:
        values = models["value"].scalars(
            params["value"], response_hidden(models["value"], params["value"], completions)
        )
    columns = jnp.arange(values.shape[1], dtype=jnp.int32)
    behind = ops.last_true_index(completions.mask)[:, None] + 1
    return logprobs, entropy, jnp.take_along_axis(values, jnp.minimum(columns, behind), axis=1)


def score(
    models: Models,
    params: Mapping[str, Params],
    completions: Completions,
    *,
    temperature: float,
    sampler_logprobs: bool = False,
) -> Scored:
    """Score completions with every model, at the sampling temperature. Pure; jit with models and temperature static.

    models, params: by role. sampler_logprobs: take the policy's log-probabilities from the sampler instead of a pass of their
    own; under jit that pass then does not exist, unless the policy's trunk carries the values. Raises InputError for a role
    that only one of the two mappings has.
    """
    for role in ROLES:
        if (role in models) != (role in params):
            raise InputError(f"score: give both the model and the parameters of the role {role!r}, or neither")
    policy, values = models["policy"], None
    if "value" not in models and policy.config.head == "lm":
        logprobs, _ = policy_logprobs(policy, params["policy"], completions, temperature=temperature)
    else:
        logprobs, _, values = policy_and_values(models, params, completions, temperature=temperature)
    if sampler_logprobs:
        logprobs = completions.logprobs
    reference = None
    if "reference" in models:
        reference, _ = policy_logprobs(models["reference"], params["reference"], completions, temperature=temperature)
    scores = {}
    if "reward" in models:
        scores["reward"] = sequence_scores(models["reward"], params["reward"], as_token_batch(completions))
    return Scored(completions, logprobs, reference, values, scores)

"""Forward passes over sequences: token log-probabilities, entropies and scalar scores, shared by all loops."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array

from rlhf_jax import ops
from rlhf_jax.batches import TokenBatch
from rlhf_jax.models.folding import Picked
from rlhf_jax.models.model import Model
from rlhf_jax.types import Completions, Params


def as_token_batch(completions: Completions) -> TokenBatch:
    """Join prompt and response to one sequence [B, P + T]; loss_mask is True on response tokens."""
    prompts = completions.prompts
    mask = jnp.concatenate([prompts.mask, completions.mask], axis=1)
    return TokenBatch(
        tokens=jnp.concatenate([prompts.tokens, completions.tokens], axis=1),
        positions=ops.positions_from_mask(mask),
        segment_ids=mask.astype(jnp.int32),
        loss_mask=jnp.concatenate([jnp.zeros_like(prompts.mask), completions.mask], axis=1),
    )


def batch_hidden(model: Model, params: Params, batch: TokenBatch) -> Array:
    """Return the final hidden states [B, S, D] of a batch."""
    return model.hidden(params, batch.tokens, positions=batch.positions, segment_ids=batch.segment_ids)


def sequence_logprobs(model: Model, params: Params, batch: TokenBatch) -> tuple[Array, Array]:
    """Return (log-probability of the token at each column given those before it, entropy there), float32 [B, S].

    Temperature 1; both are 0 where loss_mask is False. Logits exist for ``config.logits_chunk`` columns at a time.
    """
    return _logprobs_of(model, params, batch_hidden(model, params, batch), batch)


def sequence_logprobs_and_router_loss(model: Model, params: Params, batch: TokenBatch) -> tuple[Array, Array, Array]:
    """Return `sequence_logprobs` and the load-balancing loss of a model with experts times its coefficient, float32 []."""
    hidden, router = model.hidden_and_router_loss(
        params, batch.tokens, positions=batch.positions, segment_ids=batch.segment_ids
    )
    return *_logprobs_of(model, params, hidden, batch), router


def _logprobs_of(model: Model, params: Params, hidden: Array, batch: TokenBatch) -> tuple[Array, Array]:
    logprobs, entropy = _predict_logprobs(model, params, hidden[:, :-1], batch.tokens[:, 1:], batch.loss_mask[:, 1:])
    return jnp.pad(logprobs, ((0, 0), (1, 0))), jnp.pad(entropy, ((0, 0), (1, 0)))


def _predict_logprobs(
    model: Model, params: Params, hidden: Array, targets: Array, mask: Array, temperature: float = 1.0
) -> tuple[Array, Array]:
    """Return `ops.hidden_logprobs` of the model, 0 where the mask is False.

    With ``model.fold.targets`` only the tokens under the mask have logits.
    """

    def logprobs(hidden: Array, targets: Array, mask: Array) -> tuple[Array, Array]:
        return ops.hidden_logprobs(
            hidden,
            lambda part: model.logits(params, part),
            targets,
            temperature=temperature,
            chunk_size=model.config.logits_chunk,
            mask=mask,
        )

    if model.fold is None or model.fold.targets is None:
        return logprobs(hidden, targets, mask)
    picked = Picked.of(mask, model.fold.targets, model.constrain.parts("act_batch"))
    picked_logprobs, entropy = logprobs(picked.take(hidden), picked.take(targets), picked.valid)
    return picked.put(picked_logprobs), picked.put(entropy)


def response_hidden(model: Model, params: Params, completions: Completions) -> Array:
    """Return the hidden states [B, T, D] from which response token t is predicted: sequence columns P - 1 ... P + T - 2."""
    width = completions.prompts.tokens.shape[1]
    return batch_hidden(model, params, as_token_batch(completions))[:, width - 1 : -1]


def response_logprobs(
    model: Model,
    params: Params,
    hidden: Array,
    completions: Completions,
    *,
    temperature: float,
) -> tuple[Array, Array]:
    """Return (log-probabilities of the response tokens, entropies), float32 [B, T], 0 outside the response."""
    return _predict_logprobs(model, params, hidden, completions.tokens, completions.mask, temperature)


def sequence_scores(model: Model, params: Params, batch: TokenBatch) -> Array:
    """Return the output of the scalar head at the last token of each row, float32 [B] (0 for rows of only padding)."""
    scalars = model.scalars(params, batch_hidden(model, params, batch))
    last = ops.last_true_index(batch.segment_ids > 0)
    picked = jnp.take_along_axis(scalars, jnp.maximum(last, 0)[:, None], axis=1)[:, 0]
    return jnp.where(last >= 0, picked, 0.0)


def policy_logprobs(
    model: Model, params: Params, completions: Completions, *, temperature: float
) -> tuple[Array, Array]:
    """Return (logprobs, entropy) of the response tokens, float32 [B, T] each."""
    hidden = response_hidden(model, params, completions)
    return response_logprobs(model, params, hidden, completions, temperature=temperature)

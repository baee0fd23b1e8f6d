"""Pure array maths: masks, log-probabilities, KL, advantages, losses, sampling. Knows no models, no meshes."""

from __future__ import annotations

from rlhf_jax.ops.advantages import (
    Convention,
    MissingEos,
    gae,
    penalise_missing_eos,
    shape_rewards,
    terminal_index,
    terminal_mask,
    value_mask,
)
from rlhf_jax.ops.kl import KLKind, adaptive_kl_coefficient, kl_estimate
from rlhf_jax.ops.logprobs import Unembed, entropy_from_logits, hidden_logprobs, logprobs_and_entropy, token_logprobs
from rlhf_jax.ops.losses import (
    best_of_k_loss,
    binary_label_loss,
    centring_penalty,
    kwise_loss,
    magnitude_loss,
    nll_loss,
    normalising_gain_bias,
    pairwise_loss,
    plackett_luce_loss,
    policy_loss,
    rating_loss,
    value_loss,
)
from rlhf_jax.ops.masking import (
    end_mask,
    last_true_index,
    masked_mean,
    masked_sum,
    masked_var,
    positions_from_mask,
    whiten,
    zero_outside,
)
from rlhf_jax.ops.preference import PREFERENCE_KINDS, PreferenceKind, preference_loss
from rlhf_jax.ops.sampling import penalise_repetition, sample_tokens, token_keys, truncate_logits

__all__ = [
    "PREFERENCE_KINDS",
    "Convention",
    "KLKind",
    "MissingEos",
    "PreferenceKind",
    "Unembed",
    "adaptive_kl_coefficient",
    "best_of_k_loss",
    "binary_label_loss",
    "centring_penalty",
    "end_mask",
    "entropy_from_logits",
    "gae",
    "hidden_logprobs",
    "kl_estimate",
    "kwise_loss",
    "last_true_index",
    "logprobs_and_entropy",
    "magnitude_loss",
    "masked_mean",
    "masked_sum",
    "masked_var",
    "nll_loss",
    "normalising_gain_bias",
    "pairwise_loss",
    "penalise_missing_eos",
    "penalise_repetition",
    "plackett_luce_loss",
    "policy_loss",
    "positions_from_mask",
    "preference_loss",
    "rating_loss",
    "sample_tokens",
    "shape_rewards",
    "terminal_index",
    "terminal_mask",
    "token_keys",
    "token_logprobs",
    "truncate_logits",
    "value_loss",
    "value_mask",
    "whiten",
    "zero_outside",
]

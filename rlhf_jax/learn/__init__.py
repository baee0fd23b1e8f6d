"""Losses and the training step. Handed functions, never imports a model."""

from rlhf_jax.learn.dpo import DPOConfig, implicit_rewards, make_dpo_loss, make_dpo_terms
from rlhf_jax.learn.epochs import minibatch_indices
from rlhf_jax.learn.grpo import GroupBatch, GRPOConfig, make_grpo_loss, prepare_groups, update_groups
from rlhf_jax.learn.guards import RewardSpread, stop_if_not_identity, stop_if_sampler_differs, warn_if_kl_is_negative
from rlhf_jax.learn.importance import ImportanceConfig
from rlhf_jax.learn.optim import OptimizerConfig, make_optimizer, make_schedule, scale_by_adam_tf
from rlhf_jax.learn.ppo import (
    PPOConfig,
    PPOState,
    make_ppo_loss,
    next_kl_coefficient,
    ppo_optimizer_labels,
    prepare,
    update,
)
from rlhf_jax.learn.ranked import pair_halves, pair_mask, pair_mean, pair_rows, rank_major
from rlhf_jax.learn.reward import make_reward_loss, pair_scores, reward_terms
from rlhf_jax.learn.sft import make_sft_loss
from rlhf_jax.learn.step import gradients, initial_state, make_train_step

__all__ = [
    "DPOConfig",
    "GRPOConfig",
    "GroupBatch",
    "ImportanceConfig",
    "OptimizerConfig",
    "PPOConfig",
    "PPOState",
    "RewardSpread",
    "gradients",
    "implicit_rewards",
    "initial_state",
    "make_dpo_loss",
    "make_dpo_terms",
    "make_grpo_loss",
    "make_optimizer",
    "make_ppo_loss",
    "make_reward_loss",
    "make_schedule",
    "make_sft_loss",
    "make_train_step",
    "minibatch_indices",
    "next_kl_coefficient",
    "pair_halves",
    "pair_mask",
    "pair_mean",
    "pair_rows",
    "pair_scores",
    "ppo_optimizer_labels",
    "prepare",
    "prepare_groups",
    "rank_major",
    "reward_terms",
    "scale_by_adam_tf",
    "stop_if_not_identity",
    "stop_if_sampler_differs",
    "update",
    "update_groups",
    "warn_if_kl_is_negative",
]

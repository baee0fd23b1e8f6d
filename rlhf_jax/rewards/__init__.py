"""Programmatic rewards: functions that score responses without a reward model (docs/rewards.md)."""

from rlhf_jax.rewards.final_answer import FinalAnswer, final_answer
from rlhf_jax.rewards.gate import CheckedReward, Reward, RewardSource, Scores, open_reward
from rlhf_jax.rewards.pool import RewardPool
from rlhf_jax.rewards.sentiment import (
    SentimentCorpus,
    SentimentModel,
    SentimentScorer,
    fit_sentiment,
    opening_prompts,
    read_sentences,
    sentiment_scorer,
)
from rlhf_jax.rewards.support_desk import GoldScore, gold_score

__all__ = [
    "CheckedReward",
    "FinalAnswer",
    "GoldScore",
    "Reward",
    "RewardPool",
    "RewardSource",
    "Scores",
    "SentimentCorpus",
    "SentimentModel",
    "SentimentScorer",
    "final_answer",
    "fit_sentiment",
    "gold_score",
    "open_reward",
    "opening_prompts",
    "read_sentences",
    "sentiment_scorer",
]

"""Rewards that come from texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlhf_jax import data
from rlhf_jax.errors import InputError
from rlhf_jax.rewards import CheckedReward, Reward
from rlhf_jax.types import Completions


@dataclasses.dataclass(frozen=True)
class TextScores:
    """What the hosts say of a rollout's texts.

    scores: float32 [B], 0 where scoring failed; None when a model gives them. scored: bool [B], None when nothing failed.
    metrics: what to report beside: ``monitor/NAME``, means of the monitor's scores, and how many responses could not be
    scored.
    """

    scores: np.ndarray | None
    scored: np.ndarray | None
    metrics: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class TextRewards:
    """What the hosts make of responses as texts. rewards: its ``key`` is the score, None: a model gives it. monitor: scores
    that are logged and not trained on."""

    rewards: CheckedReward | None
    key: str
    monitor: CheckedReward | None

    @classmethod
    def beside(cls, model: Any, rewards: Reward | None, key: str, monitor: Reward | None) -> TextRewards:
        """Raises InputError unless exactly one of ``model`` (the reward model's source) and ``rewards`` is given."""
        if (model is None) == (rewards is None):
            raise InputError("run.reward, run.reward_texts: give exactly one")
        return cls(
            None if rewards is None else CheckedReward(rewards, "run.reward_texts", key),
            key,
            None if monitor is None else CheckedReward(monitor, "run.monitor"),
        )

    @property
    def read_texts(self) -> bool:
        """Whether there is anything to do."""
        return self.rewards is not None or self.monitor is not None

    def __call__(self, replies: Completions, records: Sequence[Any], tokenizer: PreTrainedTokenizerBase) -> TextScores:
        """replies: numpy. records: the prompts. Raises InputError for answers that are no scores, RunStopped when no response
        could be scored."""
        if not self.read_texts:
            return TextScores(None, None, {})
        responses = data.responses(replies, records, tokenizer)
        metrics: dict[str, Any] = {}
        scores = scored = None
        if self.rewards is not None:
            score = self.rewards(responses)[self.key]
            scores = score.values.astype(np.float32)
            if score.failed:
                scored, metrics["reward_failed"] = score.scored, score.failed
        watched = {} if self.monitor is None else self.monitor(responses)
        metrics |= {f"monitor/{name}": column.mean for name, column in watched.items()}
        if failed := max((column.failed for column in watched.values()), default=0):
            metrics["monitor_failed"] = failed
        return TextScores(scores, scored, metrics)

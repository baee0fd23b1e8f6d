"""Rewards and monitors that score texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlhf_jax import data
from rlhf_jax.errors import InputError
from rlhf_jax.rewards import CheckedReward, Reward, RewardSource, Scores, open_reward
from rlhf_jax.types import Completions

AnyReward = Reward | RewardSource


@dataclasses.dataclass(frozen=True)
class TextScores:
    """The scores of the texts of a rollout.

    scores: {name: float32 [B]}, 0 where scoring failed; {} when only models score. scored: bool [B], whether a response could be
    scored.
    metrics: ``monitor/NAME``, means of the monitor's scores, and the number of responses that could not be scored.
    """

    scores: Mapping[str, np.ndarray]
    scored: np.ndarray
    metrics: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class TextRewards:
    """The text reward and the monitor of a run.

    rewards: its ``key`` is the score; None when a model scores. monitor: scores that are logged and not trained on.
    """

    rewards: CheckedReward | None
    key: str
    monitor: CheckedReward | None

    @classmethod
    def beside(cls, model: Any, rewards: AnyReward | None, key: str, monitor: AnyReward | None) -> TextRewards:
        """Open reward and monitor.

        model: the source of the reward model. Raises InputError unless there is one of model and rewards.
        """
        if (model is None) == (rewards is None):
            raise InputError("run.reward, run.reward_texts: give exactly one")
        return cls(
            None if rewards is None else CheckedReward(open_reward(rewards), "run.reward_texts", key),
            key,
            None if monitor is None else CheckedReward(open_reward(monitor), "run.monitor"),
        )

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the scores that texts get, fixed before the first step."""
        return () if self.rewards is None else (self.key,)

    @property
    def read_texts(self) -> bool:
        """Whether there is anything to do."""
        return self.rewards is not None or self.monitor is not None

    def columns(
        self, completions: Completions, records: Sequence[Any], tokenizer: PreTrainedTokenizerBase
    ) -> dict[str, dict[str, Scores]]:
        """Return every score of ``reward_texts`` and ``monitor`` under these names. completions: numpy. records: the prompts.

        Raises InputError for values that are not scores, RunStopped when no response could be scored.
        """
        if not self.read_texts:
            return {}
        responses = data.responses(completions, records, tokenizer)
        scorers = {"reward_texts": self.rewards, "monitor": self.monitor}
        return {name: dict(scorer(responses)) for name, scorer in scorers.items() if scorer is not None}

    def chosen(self, columns: Mapping[str, Mapping[str, Scores]], rows: int) -> TextScores:
        """Return the scores to train on, and the metrics to report. rows: number of responses."""
        scores: dict[str, np.ndarray] = {}
        scored = np.ones(rows, np.bool_)
        metrics: dict[str, Any] = {}
        if self.rewards is not None:
            score = columns["reward_texts"][self.key]
            scores[self.key], scored = score.values.astype(np.float32), score.scored
            if score.failed:
                metrics["reward_failed"] = score.failed
        watched = columns.get("monitor", {})
        metrics |= {f"monitor/{name}": column.mean for name, column in watched.items()}
        if failed := max((column.failed for column in watched.values()), default=0):
            metrics["monitor_failed"] = failed
        return TextScores(scores, scored, metrics)

    def __call__(
        self, completions: Completions, records: Sequence[Any], tokenizer: PreTrainedTokenizerBase
    ) -> TextScores:
        """Score these responses (numpy). Raises as `columns` does."""
        return self.chosen(self.columns(completions, records, tokenizer), len(completions.ended))

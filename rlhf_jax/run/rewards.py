"""Rewards that come from texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlhf_jax import data
from rlhf_jax.rewards import Score
from rlhf_jax.types import Completions, InputError


@dataclasses.dataclass(frozen=True)
class TextRewards:
    """What the hosts make of replies as texts. rewards: its ``key`` is the score, None: a model gives it. monitor: scores
    that are logged and not trained on."""

    rewards: Score | None
    key: str
    monitor: Score | None

    @classmethod
    def beside(cls, model: Any, rewards: Score | None, key: str, monitor: Score | None) -> TextRewards:
        """Raises InputError unless exactly one of ``model`` (the reward model's source) and ``rewards`` is given."""
        if (model is None) == (rewards is None):
            raise InputError("run.reward, run.reward_texts: give exactly one")
        return cls(rewards, key, monitor)

    @property
    def read_texts(self) -> bool:
        """Whether there is anything to do."""
        return self.rewards is not None or self.monitor is not None

    def __call__(
        self, replies: Completions, records: Sequence[Any], tokenizer: PreTrainedTokenizerBase
    ) -> tuple[np.ndarray | None, dict[str, Any]]:
        """(scores, float32 [B], or None; means of the monitor's scores as ``monitor/NAME``). replies: numpy. records: the
        prompts. Raises InputError when there is no such key."""
        if not self.read_texts:
            return None, {}
        texts = data.responses(replies, records, tokenizer)
        scores = None
        if self.rewards is not None:
            values = self.rewards(*texts)
            if self.key not in values:
                raise InputError(f"run.reward_key = {self.key!r}: reward_texts gives {', '.join(sorted(values))}")
            scores = np.asarray(values[self.key], np.float32)
        watched = {} if self.monitor is None else self.monitor(*texts)
        return scores, {f"monitor/{key}": np.mean(value) for key, value in watched.items()}

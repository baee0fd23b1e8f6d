"""Builders of rewards that gin files name, and of the prompts that belong to one."""

from __future__ import annotations

from rlhf_jax.data import Template
from rlhf_jax.data.record_sets import Records, RecordSource
from rlhf_jax.rewards import support_desk
from rlhf_jax.rewards.final_answer import FinalAnswer
from rlhf_jax.rewards.gate import Reward, RewardSource, open_reward
from rlhf_jax.rewards.pool import RewardPool
from rlhf_jax.rewards.sentiment import SentimentCorpus, opening_prompts, sentiment_scorer


def sentiment_prompts(
    corpus: SentimentCorpus, part: str = "prompts", sentiment: str = "positive", limit: int | None = None
) -> RecordSource:
    """Openings of labelled sentences to continue, as plain text (as ``train``). part: "prompts", or "heldout" to compare
    policies on; the reward is fitted on neither. sentiment: "positive", "negative" or "both"."""
    template = Template(style="raw")

    def read() -> Records:
        prompts = opening_prompts(corpus, part, sentiment)
        return Records(prompts[:limit], [], template, files=tuple(corpus.files.values()))

    return RecordSource(template, read)


def desk_gold() -> Reward:
    """The support desk's exact scorer: "gold" and "gold/COMPONENT" in [0, 1]."""
    return support_desk.score


def final_answer(column: str = "answer") -> Reward:
    """Whether the number after the last "####", or in the last \\boxed{}, is that of the prompt's ``column`` (one of
    ``Fields.extra``): "correct", and "answered", each 0 or 1."""
    return FinalAnswer(column)


def in_processes(score: Reward | RewardSource, workers: int = 2, seconds: float = 30.0) -> RewardSource:
    """``score`` of every response by itself in one of ``workers`` processes; one that takes longer than ``seconds``, or
    fails, stops the run with the id of its prompt."""
    return RewardSource(lambda: RewardPool(open_reward(score), workers=workers, seconds=seconds))


def sentiment_scores(corpus: SentimentCorpus) -> RewardSource:
    """How positive a continuation sounds: "sentiment" (the reward), "second_opinion", "words", "distinct"."""
    return RewardSource(lambda: sentiment_scorer(corpus))

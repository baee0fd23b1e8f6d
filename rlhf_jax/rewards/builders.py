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
    """Build prompts that are the openings of labelled sentences, as plain text.

    corpus: the files of labelled sentences.
    part: "prompts" to train on, or "heldout" to compare policies on; the reward is fitted on neither.
    sentiment: the sentences to take, "positive", "negative" or "both".
    limit: the number of prompts at most, in the order of the files; None takes all.
    """
    template = Template(style="raw")

    def read() -> Records:
        prompts = opening_prompts(corpus, part, sentiment)
        return Records(prompts[:limit], [], template, files=tuple(corpus.files.values()))

    return RecordSource(template, read)


def desk_gold() -> Reward:
    """Build the exact scorer of support-desk responses: "gold" and "gold/COMPONENT", each in [0, 1]."""
    return support_desk.score


def final_answer(column: str = "answer") -> Reward:
    """Build a verifier of numeric answers: it compares the number after the last "####", or in the last \\boxed{}, with the
    reference answer. It gives "correct" and "answered", each 0 or 1.

    column: the column of the prompts with the reference answer, one of Fields.extra.
    """
    return FinalAnswer(column)


def in_processes(score: Reward | RewardSource, workers: int = 2, seconds: float = 30.0) -> RewardSource:
    """Build a reward that scores every response on its own in a separate process, with a time limit.

    A call that fails or takes too long stops the run and names the prompt.

    score: the reward that a process calls with one response; a process must be able to import it.
    workers: the number of processes.
    seconds: the time limit of one response.
    """
    return RewardSource(lambda: RewardPool(open_reward(score), workers=workers, seconds=seconds))


def sentiment_scores(corpus: SentimentCorpus) -> RewardSource:
    """Build a reward for positive continuations: "sentiment" (the reward), "second_opinion", "words", "distinct".

    corpus: the files of labelled sentences that the classifiers are fitted on.
    """
    return RewardSource(lambda: sentiment_scorer(corpus))

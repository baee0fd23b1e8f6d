"""A sentiment reward: naive Bayes log-odds of a text, fitted on labelled sentences that are never prompts.

The classifier is the multinomial naive Bayes of Wang and Manning 2012 ("Baselines and Bigrams", section 2.1) over the
words and word pairs that OCCUR in a text, each counted once however often it comes. With f_c(g) = number of sentences
of class c that contain the gram g, and smoothing a::

    p_c(g) = a + f_c(g)          r(g) = log(p_pos(g) / sum p_pos) - log(p_neg(g) / sum p_neg)
    log odds(text) = log(N_pos / N_neg) + sum of r(g) over the DISTINCT grams of the text

This classifier has a closed form (no optimizer: the same bits on every machine and after a resume), on short texts it is as
accurate as other linear models (the paper reports 79.0 % on rt-polarity, 10-fold), every score can be explained word by
word, and a repeated word earns nothing because only presence counts. A policy can still exploit it with lists of praise:
a second classifier, fitted on other sentences, and the share of distinct words are reported and not trained on.

Worked example, a = 1: positive "good film", "good"; negative "bad film". Five grams; p_pos sums to 9, p_neg to 8;
r(good) = log(3/9) - log(1/8) = log(8/3), r(film) = log(8/9), r(bad) = log(4/9), and log(N_pos / N_neg) = log 2.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from rlhf_jax.data import Message, Prompt, prompt_fraction, read_rows
from rlhf_jax.errors import InputError
from rlhf_jax.records import Response

Part = Literal["prompts", "heldout", "reward", "second"]
Sentiment = Literal["positive", "negative"]
PARTS: dict[Part, float] = {"prompts": 0.12, "heldout": 0.10, "reward": 0.50, "second": 0.28}
"""Share of the sentence openings in each part: the prompts of PPO; the sentences that accuracy and scale are measured on;
those that the reward is fitted on; those that the second classifier is fitted on. No opening is in two parts."""
_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?")


@dataclass(frozen=True)
class SentimentCorpus:
    """Labelled sentences in two text files, one sentence per line (rt-polarity of Pang and Lee 2005).

    directory: the directory of both files.
    positive: the name of the file of positive sentences.
    negative: the name of the file of negative sentences.
    encoding: the character encoding of both files.
    prompt_words: the number of words (between white space) that make the opening of a sentence, >= 1. A sentence without
    more words than that is used to fit the classifiers but is no prompt.
    """

    directory: str
    positive: str = "rt-polarity.pos"
    negative: str = "rt-polarity.neg"
    encoding: str = "latin-1"
    prompt_words: int = 8

    def __post_init__(self) -> None:
        for name in ("directory", "positive", "negative", "encoding"):
            if not isinstance(getattr(self, name), str):
                raise InputError(f"SentimentCorpus.{name} = {getattr(self, name)!r}: give text")
        if isinstance(self.prompt_words, bool) or not isinstance(self.prompt_words, int) or self.prompt_words < 1:
            raise InputError(f"SentimentCorpus.prompt_words = {self.prompt_words!r}: give a whole number >= 1")

    @property
    def files(self) -> dict[Sentiment, str]:
        """The path of the file of each sentiment."""
        return {
            "positive": str(Path(self.directory) / self.positive),
            "negative": str(Path(self.directory) / self.negative),
        }


@dataclass(frozen=True)
class Sentence:
    """A labelled sentence.

    id: "file name:line". opening: its first words. continuation: the words after the opening ("" when there are none).
    """

    id: str
    opening: str
    continuation: str
    sentiment: Sentiment
    part: Part

    @property
    def text(self) -> str:
        """The whole sentence, its words separated by one space."""
        return f"{self.opening} {self.continuation}".rstrip()


def part_of(opening: str) -> Part:
    """Return the part of a sentence, from a hash of its opening: sentences with the same opening are in the same part."""
    place, end = prompt_fraction((Message("user", opening),), salt="sentiment"), 0.0
    for part, share in PARTS.items():
        end += share
        if place < end:
            return part
    return part  # the shares sum to 1 up to rounding


def read_sentences(corpus: SentimentCorpus) -> list[Sentence]:
    """Read all sentences of both files, positive ones first. Raises InputError for a missing file and a wrong encoding."""
    sentences = []
    for sentiment, path in corpus.files.items():
        for line, row in read_rows(path, format="txt", encoding=corpus.encoding):
            words = str(row["text"]).split()
            opening = " ".join(words[: corpus.prompt_words])
            continuation = " ".join(words[corpus.prompt_words :])
            sentences.append(Sentence(f"{Path(path).name}:{line}", opening, continuation, sentiment, part_of(opening)))
    return sentences


def opening_prompts(corpus: SentimentCorpus, part: str = "prompts", sentiment: str = "positive") -> list[Prompt]:
    """Return the openings of sentences as prompts, in file order.

    part: "prompts" (to train on) or "heldout" (to compare policies on).
    sentiment: the sentiment of the sentences, "positive", "negative" or "both".

    Raises InputError for an unknown value, for a part that a reward is fitted on, and when no sentence is long enough.
    """
    if part not in ("prompts", "heldout"):
        raise InputError(
            f"sentiment prompts: part = {part!r}: 'prompts' or 'heldout'; on the others a reward is fitted"
        )
    if sentiment not in (*get_args(Sentiment), "both"):
        raise InputError(f"sentiment prompts: sentiment = {sentiment!r}: 'positive', 'negative' or 'both'")
    prompts = [
        Prompt(sentence.id, (Message("user", sentence.opening),))
        for sentence in read_sentences(corpus)
        if sentence.part == part and sentence.continuation and sentiment in (sentence.sentiment, "both")
    ]
    if not prompts:
        raise InputError(
            f"{corpus.directory}: no {sentiment} sentence of part {part!r} has more than "
            f"SentimentCorpus.prompt_words = {corpus.prompt_words} words; give more or longer sentences"
        )
    return prompts


def grams(text: str) -> set[str]:
    """Return the distinct words and pairs of neighbouring words of a text, in lower case, a pair with one space between.

    A word is a run of letters, with any apostrophe (straight or curly) inside it; digits and punctuation do not count.
    Example: "It's good, good." gives it's, good, "it's good", "good good".
    """
    words = _words(text)
    return {*words, *(f"{first} {second}" for first, second in itertools.pairwise(words))}


@dataclass(frozen=True)
class NaiveBayes:
    """A fitted naive Bayes classifier. weights: r(gram) of each gram, in nats. prior: log(N_pos / N_neg)."""

    weights: Mapping[str, float]
    prior: float

    def log_odds(self, text: str) -> float:
        """Return log P(positive | text) - log P(negative | text), in nats.

        Unknown grams add nothing, so that a text without known grams has the prior.
        """
        # fsum rounds once: the order of a set differs between processes, and the score must not.
        return math.fsum([self.prior, *(self.weights[gram] for gram in grams(text) if gram in self.weights)])


def fit_naive_bayes(positive: Sequence[str], negative: Sequence[str], smoothing: float = 1.0) -> NaiveBayes:
    """Fit the classifier of the module's docstring. Raises InputError when a class is empty or smoothing is not > 0."""
    if not positive or not negative:
        raise InputError(f"naive Bayes: {len(positive)} positive and {len(negative)} negative texts; needs both kinds")
    if not smoothing > 0:
        raise InputError(f"naive Bayes: smoothing = {smoothing}: must be > 0, or a gram of one class alone is infinite")
    counts = [Counter(gram for text in texts for gram in grams(text)) for texts in (positive, negative)]
    vocabulary = sorted(counts[0].keys() | counts[1].keys())
    totals = [count.total() + smoothing * len(vocabulary) for count in counts]
    shift = math.log(totals[1]) - math.log(totals[0])
    weights = {
        gram: math.log(counts[0][gram] + smoothing) - math.log(counts[1][gram] + smoothing) + shift
        for gram in vocabulary
    }
    return NaiveBayes(weights, math.log(len(positive)) - math.log(len(negative)))


@dataclass(frozen=True)
class SentimentModel:
    """A classifier with the scale of its scores.

    mean, deviation: of the log-odds of the continuations of held-out sentences, in nats.
    accuracy: (number right, number) on those continuations.
    sentence_accuracy: (number right, number) on the whole held-out sentences.
    """

    classifier: NaiveBayes
    mean: float
    deviation: float
    accuracy: tuple[int, int]
    sentence_accuracy: tuple[int, int]

    def score(self, text: str) -> float:
        """Return (log-odds - mean) / deviation: 0 for a text as positive as the average human continuation."""
        return (self.classifier.log_odds(text) - self.mean) / self.deviation


def fit_sentiment(sentences: Iterable[Sentence], part: Part) -> SentimentModel:
    """Fit a classifier on one part and measure it on the held-out one. Raises InputError when a part lacks sentences."""
    sentences = list(sentences)
    texts: dict[Sentiment, list[str]] = {kind: [] for kind in get_args(Sentiment)}
    for sentence in sentences:
        if sentence.part == part:
            texts[sentence.sentiment].append(sentence.text)
    classifier = fit_naive_bayes(texts["positive"], texts["negative"])
    heldout = [sentence for sentence in sentences if sentence.part == "heldout"]
    continued = [sentence for sentence in heldout if sentence.continuation]
    odds = np.array([classifier.log_odds(sentence.continuation) for sentence in continued], np.float64)
    if odds.size < 2 or not odds.std() > 0:
        raise InputError(
            f"sentiment reward: {odds.size} held-out sentences are longer than their opening, with no spread of "
            "log-odds to set a scale by; give more sentences or lower SentimentCorpus.prompt_words"
        )

    def count_right(odds: Iterable[float], measured: Sequence[Sentence]) -> tuple[int, int]:
        pairs = zip(odds, measured, strict=True)
        return sum((value > 0) == (sentence.sentiment == "positive") for value, sentence in pairs), len(measured)

    whole = [classifier.log_odds(sentence.text) for sentence in heldout]
    accuracies = count_right(odds.tolist(), continued), count_right(whole, heldout)
    return SentimentModel(classifier, float(odds.mean()), float(odds.std()), *accuracies)


@dataclass(frozen=True)
class SentimentScorer:
    """A `Reward` that depends on the text of the response only.

    The scores: ``sentiment``, the reward; ``second_opinion``, the score of the second classifier; ``words``, the number of
    words; ``distinct``, distinct words / words in [0, 1] (1 without words).
    """

    reward: SentimentModel
    second: SentimentModel

    def __call__(self, responses: Sequence[Response]) -> dict[str, list[float]]:
        texts = [response.text for response in responses]
        words = [_words(text) for text in texts]
        return {
            "sentiment": [self.reward.score(text) for text in texts],
            "second_opinion": [self.second.score(text) for text in texts],
            "words": [float(len(sequence)) for sequence in words],
            "distinct": [len(set(sequence)) / len(sequence) if sequence else 1.0 for sequence in words],
        }


def sentiment_scorer(corpus: SentimentCorpus) -> SentimentScorer:
    """Fit the reward and its second opinion on their two parts of the corpus.

    Raises InputError when one of them is not better than chance on held-out continuations (a guess is right more often
    than n / 2 + 1.96 sqrt(n) / 2 of n times with probability 1 / 40): files swapped or unlabelled, or too few sentences.
    """
    sentences = read_sentences(corpus)
    scorer = SentimentScorer(fit_sentiment(sentences, "reward"), fit_sentiment(sentences, "second"))
    for name, model in (("reward", scorer.reward), ("second opinion", scorer.second)):
        right, n = model.accuracy
        if right <= n / 2 + 1.96 * math.sqrt(n) / 2:
            raise InputError(
                f"{corpus.directory}: the sentiment {name} is right on {right} of {n} held-out continuations, no better "
                f"than chance; check the labels of {corpus.positive} and {corpus.negative}, or give more sentences"
            )
    return scorer


def _words(text: str) -> list[str]:
    """Return the lower-case runs of letters; an apostrophe inside a word is part of it."""
    return [word.casefold() for word in _WORD.findall(text.replace("\u2019", "'"))]

"""The sentiment reward: hand-worked naive Bayes, disjoint parts, a scale measured on human text, the published accuracy."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from rlhf_jax.data import read_rows
from rlhf_jax.errors import InputError
from rlhf_jax.records import Response
from rlhf_jax.rewards.sentiment import (
    PARTS,
    Sentence,
    SentimentCorpus,
    fit_naive_bayes,
    fit_sentiment,
    grams,
    opening_prompts,
    part_of,
    read_sentences,
    sentiment_scorer,
)

NOUNS = ("film", "story", "cast", "plot", "score", "script", "ending", "scene", "idea", "voice")
PRAISE = ("moving", "funny", "warm", "clever", "lovely")
BLAME = ("dull", "stale", "loud", "clumsy", "grim")


def sentence(number: int, words: Sequence[str]) -> str:
    """'the film of number 3 is moving and truly warm': 5 words that name it, 5 that judge it."""
    first, second = words[number % 5], words[number // 5 % 5]
    return f"the {NOUNS[number % 10]} of number {'x' * (number + 1)} is {first} and truly {second}"


@pytest.fixture
def corpus(tmp_path: Path) -> SentimentCorpus:
    """200 sentences of each kind that no two begin alike, and one in latin-1 that is shorter than an opening."""
    praise = [sentence(number, PRAISE) for number in range(200)]
    blame = [sentence(number, BLAME).replace("the", "this", 1) for number in range(200)]
    (tmp_path / "up.txt").write_text("\n".join([*praise, "très belle"]) + "\n", encoding="latin-1")
    (tmp_path / "down.txt").write_text("\n".join(blame) + "\n", encoding="latin-1")
    return SentimentCorpus(str(tmp_path), "up.txt", "down.txt", prompt_words=5)


def test_grams_are_distinct_words_and_neighbours() -> None:
    assert grams("It\u2019s GOOD, good. 10 out") == {"it's", "good", "out", "it's good", "good good", "good out"}
    assert grams(" .,!\n") == set()


def test_naive_bayes_by_hand() -> None:
    # positive: good 2, film 1, "good film" 1; negative: bad 1, film 1, "bad film" 1; five grams, smoothing 1:
    # p_pos sums to 4 + 5 = 9, p_neg to 3 + 5 = 8.
    model = fit_naive_bayes(["good film", "good"], ["bad film"])
    expected = {
        "good": math.log(3 / 9 / (1 / 8)),
        "film": math.log(2 / 9 / (2 / 8)),
        "good film": math.log(2 / 9 / (1 / 8)),
        "bad": math.log(1 / 9 / (2 / 8)),
        "bad film": math.log(1 / 9 / (2 / 8)),
    }
    assert model.weights == pytest.approx(expected, abs=1e-12)
    assert model.prior == pytest.approx(math.log(2))
    assert model.log_odds("Good film!") == pytest.approx(math.log(2 * (8 / 3) * (8 / 9) * (16 / 9)))
    assert model.log_odds("") == model.log_odds("unknown words") == model.prior


def test_a_gram_counts_once_in_a_sentence_and_in_a_score() -> None:
    once, often = fit_naive_bayes(["fine film"], ["poor"]), fit_naive_bayes(["fine film fine"], ["poor"])
    # "film fine" is one gram more: p_pos sums to 4 + 5 against 3 + 4, p_neg to 1 + 5 against 1 + 4.
    assert often.weights["fine"] == pytest.approx(once.weights["fine"] + math.log(7 / 9) - math.log(5 / 6))
    assert once.log_odds("fine, fine, fine") == once.log_odds("fine")


def test_naive_bayes_refuses_what_it_cannot_fit() -> None:
    with pytest.raises(InputError, match="0 positive and 1 negative"):
        fit_naive_bayes([], ["bad"])
    with pytest.raises(InputError, match="smoothing = 0"):
        fit_naive_bayes(["good"], ["bad"], smoothing=0)


def test_parts_are_decided_by_the_opening_and_have_their_shares() -> None:
    assert sum(PARTS.values()) == pytest.approx(1.0)
    openings = [f"opening number {number}" for number in range(4000)]
    parts = [part_of(opening) for opening in openings]
    for part, share in PARTS.items():
        deviation = math.sqrt(share * (1 - share) / len(parts))
        assert abs(parts.count(part) / len(parts) - share) < 4 * deviation, part
    assert [part_of(f"  {opening.upper()} ") for opening in openings[:50]] == parts[:50]


def test_parts_share_no_opening_and_prompts_are_not_fitted_on(corpus: SentimentCorpus) -> None:
    sentences = read_sentences(corpus)
    assert len(sentences) == 401
    where: dict[str, set[str]] = {}
    for item in sentences:
        where.setdefault(item.opening, set()).add(item.part)
    assert all(len(parts) == 1 for parts in where.values())
    prompts = {prompt.prompt[0].content for prompt in opening_prompts(corpus, "prompts", "both")}
    assert prompts and prompts == {item.opening for item in sentences if item.part == "prompts" and item.continuation}
    # Whatever is said after the prompts' openings does not move the reward.
    altered = [
        Sentence(s.id, s.opening, "entirely other words", s.sentiment, s.part) if s.part == "prompts" else s
        for s in sentences
    ]
    assert fit_sentiment(altered, "reward") == fit_sentiment(sentences, "reward")


def test_prompts_are_the_first_words_in_file_order(corpus: SentimentCorpus) -> None:
    prompts = opening_prompts(corpus)
    lines = Path(corpus.files["positive"]).read_text("latin-1").splitlines()
    for prompt in prompts:
        line = int(prompt.id.removeprefix("up.txt:"))
        assert prompt.prompt[0].content == " ".join(lines[line - 1].split()[:5])
    assert [int(prompt.id.split(":")[1]) for prompt in prompts] == sorted(int(p.id.split(":")[1]) for p in prompts)
    negative = opening_prompts(corpus, "prompts", "negative")
    assert all(prompt.id.startswith("down.txt:") for prompt in negative)
    assert opening_prompts(corpus, "prompts", "both") == [*prompts, *negative]
    heldout = opening_prompts(corpus, "heldout", "both")
    assert heldout and not {p.id for p in heldout} & {p.id for p in [*prompts, *negative]}


def test_a_sentence_without_more_words_is_no_prompt(corpus: SentimentCorpus) -> None:
    short = next(item for item in read_sentences(corpus) if item.id == "up.txt:201")
    assert (short.text, short.opening, short.continuation) == ("très belle", "très belle", "")
    whole = SentimentCorpus(corpus.directory, corpus.positive, corpus.negative, prompt_words=10)
    with pytest.raises(InputError, match=r"no positive sentence of part 'prompts' has more than .*prompt_words = 10"):
        opening_prompts(whole)


@pytest.mark.parametrize(
    ("part", "sentiment", "message"),
    [
        ("reward", "positive", "on the others a reward is fitted"),
        ("prompts", "happy", "'positive', 'negative' or 'both'"),
    ],
)
def test_unknown_parts_and_sentiments_are_refused(
    corpus: SentimentCorpus, part: str, sentiment: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        opening_prompts(corpus, part, sentiment)


def test_the_scale_is_that_of_held_out_continuations(corpus: SentimentCorpus) -> None:
    sentences = read_sentences(corpus)
    scorer = sentiment_scorer(corpus)
    continuations = [item.continuation for item in sentences if item.part == "heldout" and item.continuation]
    for name in ("sentiment", "second_opinion"):
        scores = scorer([Response((), text) for text in continuations])[name]
        assert math.fsum(scores) / len(scores) == pytest.approx(0, abs=1e-9)
        assert math.fsum(s * s for s in scores) / len(scores) == pytest.approx(1)
    # Every judgement has a word of its kind, so both classifiers are always right.
    assert scorer.reward.accuracy == scorer.second.accuracy == (len(continuations), len(continuations))
    assert scorer.reward.classifier != scorer.second.classifier


def test_scores_go_with_praise_and_repetition_shows(corpus: SentimentCorpus) -> None:
    scorer = sentiment_scorer(corpus)
    texts = [" is moving and truly warm", " is dull and truly grim", " moving moving moving moving", "", " 12 !"]
    scores = scorer([Response((), text) for text in texts])
    assert scores["sentiment"][0] > 0.5 and scores["sentiment"][1] < -0.5
    assert scores["second_opinion"][0] > 0.5 and scores["second_opinion"][1] < -0.5
    assert scores["words"] == [5.0, 5.0, 4.0, 0.0, 0.0]
    assert scores["distinct"] == [1.0, 1.0, 0.25, 1.0, 1.0]
    assert scores["sentiment"][2] == scorer.reward.score("moving")
    assert scores["sentiment"][3] == scores["sentiment"][4] == scorer.reward.score("")
    assert list(scores) == ["sentiment", "second_opinion", "words", "distinct"]


def test_scores_are_the_same_bits_in_every_process(corpus: SentimentCorpus) -> None:
    # Sets of strings are ordered by a hash that is salted anew in every process.
    program = (
        "import sys; from rlhf_jax.rewards.sentiment import *; "
        f"c = SentimentCorpus({corpus.directory!r}, 'up.txt', 'down.txt', prompt_words=5); s = sentiment_scorer(c); "
        "print([s.reward.score(x.text).hex() for x in read_sentences(c)], s.second.mean.hex())"
    )
    results = {
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(results) == 1 and len(results.pop()) > 4000


def test_what_is_missing_is_said(tmp_path: Path, corpus: SentimentCorpus) -> None:
    with pytest.raises(InputError, match=r"rt-polarity.pos: no such file"):
        read_sentences(SentimentCorpus(str(tmp_path)))
    with pytest.raises(InputError, match=r"up.txt:201: byte 0xe8 is not utf-8"):
        read_sentences(SentimentCorpus(corpus.directory, "up.txt", "down.txt", encoding="utf-8"))
    with pytest.raises(InputError, match="naive Bayes: 0 positive"):
        fit_sentiment([s for s in read_sentences(corpus) if s.sentiment == "negative"], "reward")
    with pytest.raises(InputError, match="0 held-out sentences are longer than their opening"):
        fit_sentiment([s for s in read_sentences(corpus) if s.part != "heldout"], "reward")


@pytest.mark.parametrize(("field", "value"), [("directory", 3), ("prompt_words", 0), ("prompt_words", True)])
def test_corpus_fields_are_checked(field: str, value: object) -> None:
    with pytest.raises(InputError, match=f"SentimentCorpus.{field} = {value!r}"):
        SentimentCorpus(**({"directory": "d"} | {field: value}))  # type: ignore[arg-type]


REAL = Path(os.environ.get("RLHF_JAX_ASSETS", "absent")) / "data/text/rt-polarity"


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason="RLHF_JAX_ASSETS names no directory with rt-polarity")
def test_published_accuracy_on_rt_polarity() -> None:
    """Wang and Manning 2012, table 2, "RTs": multinomial naive Bayes with bigrams 79.0 %, 10-fold cross-validation."""
    texts = {
        name: [str(row["text"]) for _, row in read_rows(REAL / f"rt-polarity.{name}", format="txt", encoding="latin-1")]
        for name in ("pos", "neg")
    }
    assert [len(rows) for rows in texts.values()] == [5331, 5331]
    right = 0
    for fold in range(10):
        training = [[text for i, text in enumerate(rows) if i % 10 != fold] for rows in texts.values()]
        model = fit_naive_bayes(*training)
        right += sum(model.log_odds(text) > 0 for text in texts["pos"][fold::10])
        right += sum(model.log_odds(text) <= 0 for text in texts["neg"][fold::10])
    assert right / 10662 == pytest.approx(0.790, abs=0.01)
    scorer = sentiment_scorer(SentimentCorpus(str(REAL)))
    assert scorer.reward.accuracy == (685, 998) and scorer.reward.sentence_accuracy == (812, 1072)
    assert scorer.second.accuracy == (669, 998) and scorer.second.sentence_accuracy == (786, 1072)
    assert len(opening_prompts(SentimentCorpus(str(REAL)))) == 613

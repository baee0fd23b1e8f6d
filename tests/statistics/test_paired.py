"""Joins on record ids and paired comparisons against scipy."""

from __future__ import annotations

import random

import numpy as np
import pytest
import scipy.stats

from rlhf_jax.errors import InputError
from rlhf_jax.statistics import compare_means, compare_wins, join_on_ids, paired_bootstrap

FIRST = [("a", 1.0), ("b", 2.0), ("c", 4.0), ("only first", 9.0), ("failed", None)]
SECOND = [("c", 2.0), ("a", 0.0), ("b", 2.0), ("failed", 7.0)]


def test_only_common_scored_ids_are_compared():
    result = compare_means(join_on_ids(FIRST, SECOND))
    assert (result.pairs, result.only_first, result.only_second) == (3, 1, 1)
    expected = scipy.stats.ttest_rel([1, 2, 4], [0, 2, 2]).confidence_interval(0.95)
    assert (result.estimate.low, result.estimate.high) == pytest.approx((expected.low, expected.high))


def test_shuffled_rows_give_the_same_numbers():
    rng = np.random.default_rng(0)
    first, second = ([(str(index), float(x)) for index, x in enumerate(rng.standard_normal(30))] for _ in range(2))

    def median_gap(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.median(a) - np.median(b))

    def results(x: list, y: list) -> list:
        pairs = join_on_ids(x, y)
        bootstrap = paired_bootstrap(pairs, median_gap, seed=0, resamples=200)
        return [compare_means(pairs), compare_wins(pairs), bootstrap]

    expected = results(first, second)
    random.Random(0).shuffle(first)
    random.Random(1).shuffle(second)
    assert results(first, second) == expected


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ([("a", 1.0), ("a", 2.0)], [("a", 1.0)], r"\(first\): the id 'a' appears twice"),
        ([("a", 1.0)], [("a", None), ("a", 2.0)], r"\(second\): the id 'a' appears twice"),
        ([("a", 1.0)], [("b", 1.0)], "none of 1 and 1 scored records has a partner"),
        ([("a", float("nan"))], [("a", 1.0)], "the score of 'a' is nan; give None"),
    ],
)
def test_bad_joins_are_refused(first: list, second: list, words: str):
    with pytest.raises(InputError, match=words):
        join_on_ids(first, second)


def test_responses_of_a_prompt_are_one_item():
    """Four copies of every response make the interval no narrower than that of the prompts."""
    rng = np.random.default_rng(1)
    scores = rng.standard_normal((2, 10))
    single = [[(str(index), float(x)) for index, x in enumerate(side)] for side in scores]
    copies = [[(f"{index}/{copy}", x) for index, x in side for copy in range(4)] for side in single]
    prompts = {name: name.split("/")[0] for name, _ in copies[0]}
    for compare in (compare_means, compare_wins):
        expected, actual = compare(join_on_ids(*single)), compare(join_on_ids(*copies), prompts)
        assert actual.estimate.n == 10 and actual.pairs == 40
        assert actual.estimate.low == pytest.approx(expected.estimate.low)
    with pytest.raises(InputError, match="the record '0/0' has no prompt"):
        compare_means(join_on_ids(*copies), {})


def test_wins_count_ties_as_half_and_stay_in_bounds():
    result = compare_wins(join_on_ids([("a", 2.0), ("b", 1.0), ("c", 0.0)], [("a", 1.0), ("b", 1.0), ("c", 1.0)]))
    assert result.estimate.value == 0.5 and result.estimate.low is not None and result.estimate.low > 0
    every = compare_wins(join_on_ids([(index, 1.0) for index in range(9)], [(index, 0.0) for index in range(9)]))
    # Wilson with t(8) = 2.306004 at 9 of 9: 9 / (9 + 5.317655)
    assert (every.estimate.low, every.estimate.high) == pytest.approx((9 / 14.317655, 1.0))


def test_equal_policies_have_no_interval():
    pairs = join_on_ids([("a", 1.0), ("b", 2.0)], [("a", 1.0), ("b", 2.0)])
    assert compare_means(pairs).estimate.reason == "all values are the same"
    assert compare_wins(pairs).estimate.reason == "every record is a tie"

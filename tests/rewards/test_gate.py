"""The gate of rewards accepts one finite number, or Failed, per response under each name, and rejects everything else."""

from __future__ import annotations

import math
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.data import Message
from rlhf_jax.errors import InputError, RunStopped
from rlhf_jax.records import Failed, Response
from rlhf_jax.rewards import CheckedReward

PROMPT = (Message("user", "How long?"),)
FOUR = [Response(PROMPT, text, id=f"q{index}") for index, text in enumerate(("a", "bb", "ccc", "dddd"))]


def gate(answer, key=None):
    return CheckedReward(lambda responses: answer, "run.reward_texts", key)


@pytest.mark.parametrize(
    "column",
    [
        [1, 2.5, 0, -3],
        (1.0, 2.5, 0.0, -3.0),
        np.array([1, 2.5, 0, -3], np.float32),
        jnp.array([1, 2.5, 0, -3], jnp.bfloat16),
        np.array([1, 2.5, 0, -3], object),
        [np.float32(1), jnp.float32(2.5), np.int64(0), np.array(-3.0)],
        [Fraction(1), Fraction(5, 2), False, -3],
    ],
)
def test_numbers_of_any_kind_are_taken(column):
    scores = gate({"r": column})(FOUR)["r"]
    assert scores.values.tolist() == [1.0, 2.5, 0.0, -3.0] and scores.values.dtype == np.float64
    assert scores.failed == 0 and scores.mean == 0.125 and scores.to_list() == [1.0, 2.5, 0.0, -3.0]


def test_truth_values_are_one_and_zero():
    """A verifier's natural answer."""
    for column in ([True, False, True, True], np.array([True, False, True, True])):
        assert gate({"correct": column})(FOUR)["correct"].values.tolist() == [1.0, 0.0, 1.0, 1.0]


class Unreadable:
    """An array like a torch tensor with a gradient: it has the shape of scores and cannot become a numpy array."""

    shape = (4,)

    def __array__(self, *arguments, **keywords):
        raise RuntimeError("call detach() first")


COUNTS = {
    "an array that cannot be read": (Unreadable(), r"'r' is an array of shape \(4,\) for 4 responses"),
    "durations": (np.arange(4, dtype="timedelta64[ns]"), r"'r' is an array of shape \(4,\) for 4 responses"),
    "one for all": ([1.0], r"'r' has 1 scores for 4 responses \(the first prompt is 'q0'\)"),
    "one per prompt": ([1.0, 2.0], r"'r' has 2 scores for 4 responses"),
    "too many": ([1.0] * 5, r"'r' has 5 scores for 4 responses"),
    "none at all": ([], r"'r' has 0 scores for 4 responses"),
    "an array of another length": (np.ones(3), r"'r' has 3 scores for 4 responses"),
    "a number": (1.0, r"'r' is 1\.0 for 4 responses \(the first prompt is 'q0'\); give a list"),
    "a numpy number": (np.float32(1), r"'r' is .*1\.0.* for 4 responses"),
    "a column": (np.ones((4, 1)), r"'r' is an array of shape \(4, 1\) for 4 responses"),
    "a row": (jnp.ones((1, 4)), r"'r' is an array of shape \(1, 4\) for 4 responses"),
    "nothing": (None, r"'r' is None for 4 responses"),
    "a text": ("1234", r"'r' is '1234' for 4 responses"),
    "a mapping": ({"q0": 1.0}, r"'r' is \{'q0': 1\.0\} for 4 responses"),
    "a set": ({1.0, 2.0, 3.0, 4.0}, r"'r' is \{.*\} for 4 responses"),
    "a generator": ((1.0 for _ in range(4)), r"'r' is <?generator.* for 4 responses"),
}


@pytest.mark.parametrize(("column", "words"), COUNTS.values(), ids=COUNTS)
def test_another_count_or_shape_is_refused(column, words):
    with pytest.raises(InputError, match=f"^run.reward_texts: {words}"):
        gate({"r": column})(FOUR)


ENTRIES = {
    "None": (None, "None"),
    "NaN": (math.nan, "nan"),
    "infinity": (-math.inf, "-inf"),
    "a numpy NaN": (np.float32("nan"), "nan"),
    "beyond float32": (1e39, r"1e\+39, which float32 cannot hold"),
    "a huge whole number": (10**400, "inf"),
    "a number as text": ("0.5", "'0.5'"),
    "a list": ([0.5], r"\[0\.5\]"),
    "an array": (np.ones(1), r"an array of shape \(1,\)"),
    "complex": (1j, "1j"),
    "a mapping": ({"score": 1.0}, r"\{'score': 1\.0\}"),
    "the class of failures": (Failed, "<class .*Failed"),
}


@pytest.mark.parametrize(("entry", "words"), ENTRIES.values(), ids=ENTRIES)
def test_what_is_no_finite_number_is_refused(entry, words):
    message = (
        rf"^run.reward_texts: 'r' of prompt 'q2' \(response 2 of 4\) is {words}.*; give a finite number, or Failed"
    )
    with pytest.raises(InputError, match=message):
        gate({"r": [0.0, 1.0, entry, 2.0]})(FOUR)


@pytest.mark.parametrize("column", [np.array([0, 1, np.nan, 2]), jnp.array([0, 1, jnp.inf, 2])])
def test_arrays_are_looked_at_entry_by_entry(column):
    with pytest.raises(InputError, match=r"'r' of prompt 'q2' \(response 2 of 4\) is (nan|inf); give a finite number"):
        gate({"r": column})(FOUR)
    with pytest.raises(InputError, match=r"'r' of prompt 'q0' \(response 0 of 4\) is \(?1\+0j"):
        gate({"r": np.ones(4, complex)})(FOUR)


ANSWERS = {
    "a list": ([1.0] * 4, r"gave \[1\.0, 1\.0, 1\.0, 1\.0\], not a mapping .*; write def reward\(responses"),
    "nothing": (None, "gave None, not a mapping"),
    "an array": (np.ones(4), r"gave an array of shape \(4,\), not a mapping"),
    "no names": ({}, "gave no scores"),
    "a number as name": ({0: [1.0] * 4}, "0 is no name of a score"),
    "an empty name": ({"": [1.0] * 4}, "'' is no name of a score"),
}


@pytest.mark.parametrize(("answer", "words"), ANSWERS.values(), ids=ANSWERS)
def test_an_answer_is_a_mapping_of_names(answer, words):
    with pytest.raises(InputError, match=f"^run.reward_texts: {words}"):
        gate(answer)(FOUR)


def test_names_stay_the_same_between_calls():
    answers = [{"a": [1.0] * 4, "b": [1.0] * 4}, {"b": [1.0] * 4, "a": [0.0] * 4}, {"a": [1.0] * 4}]
    reward = CheckedReward(lambda responses: answers.pop(0), "run.monitor")
    reward(FOUR), reward(FOUR)  # another order is fine
    with pytest.raises(InputError, match="^run.monitor: gave a, and a, b before; give the same names in every call"):
        reward(FOUR)


def test_the_key_must_be_there():
    with pytest.raises(InputError, match="^run.reward_key = 'golf': reward_texts gives a, gold"):
        gate({"gold": [1.0] * 4, "a": [1.0] * 4}, "golf")(FOUR)


def test_failures_are_left_out_and_counted():
    scores = gate({"r": [1.0, Failed("no\nsandbox"), 3.0, Failed("x")], "other": [0.0] * 4}, "r")(FOUR)
    assert scores["r"].failed == 2 and scores["r"].mean == 2.0 and scores["r"].reason == "no sandbox"
    assert scores["r"].scored.tolist() == [True, False, True, False]
    assert scores["r"].to_list() == [1.0, None, 3.0, None] and scores["other"].failed == 0


def test_when_all_fail_the_run_stops():
    lost = {"r": [Failed("judge is gone")] * 4, "other": [0.0] * 4}
    with pytest.raises(RunStopped, match="'r' failed for all 4 responses; prompt 'q0': judge is gone"):
        gate(lost, "r")(FOUR)
    assert gate(lost)(FOUR)["r"].mean is None  # of a monitor nothing depends


def test_the_former_signature_is_refused_when_opened():
    def former(rows, replies, ended):
        return {"r": [0.0 for _ in replies]}

    class Object:
        def __call__(self, rows, replies, ended):
            return {}

    for reward in (former, lambda rows, replies, ended: {}, Object()):
        with pytest.raises(
            InputError,
            match=r"^run.monitor: .*\(rows, replies, ended\) cannot be called with one list of responses; write "
            r"def reward\(responses: Sequence\[Response\]\) -> dict\[str, list\[float\]\].*Response: prompt, text, ended",
        ):
            CheckedReward(reward, "run.monitor")
    with pytest.raises(InputError, match=r"or bind @builder\(\) when it builds the reward"):

        def builder():
            return former

        CheckedReward(builder, "run.monitor")
    with pytest.raises(InputError, match="^run.monitor: 3 is no function"):
        CheckedReward(3, "run.monitor")
    CheckedReward(max, "run.monitor")  # says nothing of what it takes


def test_the_first_answer_decides_even_for_no_responses():
    assert gate({"r": []})([])["r"].mean is None


def test_a_masked_score_is_no_number():
    masked = np.ma.array([1.0, 2.0, 3.0, 4.0], mask=[False, True, False, False])
    with pytest.raises(InputError, match=r"'r' of prompt 'q1' \(response 1 of 4\) is None"):
        gate({"r": masked})(FOUR)
    with pytest.raises(InputError, match=r"'r' of prompt 'q0' \(response 0 of 4\) is an array of shape \(4,\)"):
        gate({"r": [Unreadable(), 1.0, 1.0, 1.0]})(FOUR)


def test_what_a_reward_changes_reaches_nobody():
    """Prompts are drawn again in later epochs, and their columns are shared by all responses to one prompt."""
    extra = {"tests": ["a", "b"]}
    responses = [Response(PROMPT, text, extra=extra, id="q") for text in ("a", "b")]

    def takes(responses):
        scores = [float(len(response.extra["tests"])) for response in responses]
        responses[0].extra["tests"].pop()
        responses.pop()
        return {"r": scores}

    checked = CheckedReward(takes, "run.reward_texts", "r")
    assert [checked(responses)["r"].values.tolist() for _ in range(2)] == [[2.0, 2.0], [2.0, 2.0]]
    assert extra == {"tests": ["a", "b"]} and len(responses) == 2

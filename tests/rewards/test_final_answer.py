"""The number that a response ends with, against the reference's: exact, and whatever way it is written."""

from __future__ import annotations

import pickle
from fractions import Fraction

import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.records import Response
from rlhf_jax.rewards import CheckedReward, FinalAnswer, RewardPool, final_answer

ANSWERS = {
    "48 / 2 = 24 clips in May.\n#### 72": 72,
    "#### 72.0": 72,
    "#### $1,000.50 in all": Fraction(2001, 2),
    "#### -5": -5,
    "#### -$5": -5,
    "#### $-5": -5,
    "#### 1,234,567": 1234567,
    "#### .5": Fraction(1, 2),
    "#### 7.2e1": 72,
    "#### 3/4": Fraction(3, 4),
    "#### 20%": 20,
    "#### 18.": 18,
    "#### 12,5": 12,  # no thousands: a list
    "#### 5\n#### 6": 6,
    "####\n8": 8,
    "#### 5\nThat was 9 - 4.": 5,
    r"so \boxed{42}.": 42,
    r"\boxed{\frac{1}{2}}": Fraction(1, 2),
    r"\boxed{x = 7}": 7,
    r"\boxed{1} or \boxed{2}": 2,
    r"#### 1 and then \boxed{2}": 2,
    r"\boxed{1}" + "\n#### 2": 2,
    "The answer is 72": None,
    "#### none": None,
    "####": None,
    r"\boxed{}": None,
    "#### 1/0": None,
    "#### \u22125": -5,
    "#### $\u22125": -5,
    "": None,
}


@pytest.mark.parametrize(("text", "number"), ANSWERS.items())
def test_the_final_answer_by_hand(text, number):
    assert final_answer(text) == number


@pytest.mark.parametrize(
    "text", ["1" * 5000, "1/" + "1" * 5000, "." + "0" * 5000, "1" * 5000 + "e5", "a" + " " * 5000 + "b"]
)
def test_what_a_policy_repeats_without_end_is_no_answer(text):
    """Python refuses to read more than 4300 digits, and a careless pattern takes hours over 5000 spaces."""
    assert final_answer(f"#### {text}") is None


@pytest.mark.parametrize("reference", ["48 / 2 = 24.\n#### 72", "72", " 72.0 ", 72, 72.0, r"\boxed{72}"])
def test_a_reference_in_any_form(reference):
    texts = ["#### 72", "144 / 2 = 72\n#### $72.00", "#### 73", "72", ""]
    responses = [Response((), text, extra={"gold": reference}, id="q") for text in texts]
    scores = CheckedReward(FinalAnswer("gold"), "run.reward_texts", "correct")(responses)
    assert scores["correct"].values.tolist() == [1, 1, 0, 0, 0]
    assert scores["answered"].values.tolist() == [1, 1, 1, 0, 0]


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({}, r"prompt 'q7' has no such column; set Fields.extra = \('answer',\)"),
        ({"answer": None}, "prompt 'q7' has None there; give a number"),
        ({"answer": True}, "prompt 'q7' has True there"),
        ({"answer": "many apples"}, "prompt 'q7' has 'many apples' there"),
        ({"answer": "2 apples, 3 pears"}, "prompt 'q7' has '2 apples, 3 pears' there"),
        ({"answer": float("nan")}, "prompt 'q7' has nan there"),
    ],
)
def test_a_prompt_without_a_reference_is_named(extra, words):
    with pytest.raises(InputError, match=rf"^final_answer.column = 'answer': {words}"):
        FinalAnswer()([Response((), "#### 1", extra=extra, id="q7")])
    with pytest.raises(InputError, match="final_answer.column = 3: give the name of a column"):
        FinalAnswer(3)


def test_it_can_go_to_processes_of_its_own():
    assert pickle.loads(pickle.dumps(FinalAnswer("gold"))) == FinalAnswer("gold")
    RewardPool(FinalAnswer(), workers=1, seconds=1)

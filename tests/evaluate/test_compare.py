"""Comparisons of policies: shares, failures, pairs, and a single prompt."""

from __future__ import annotations

import json

import numpy as np
import pytest

from rlhf_jax.data import Message
from rlhf_jax.errors import InputError, RunStopped
from rlhf_jax.evaluate import ScoredResponses, compare, completion_rows
from rlhf_jax.records import Response
from rlhf_jax.rewards import Scores
from rlhf_jax.storage.files import json_text


def scored(prefix="q", **columns) -> ScoredResponses:
    """Build responses with scores from columns of numbers; None where scoring failed."""
    count = len(next(iter(columns.values())))
    responses = [Response((Message("user", f"ask {n}"),), f"say {n}", n > 0, id=f"{prefix}{n}") for n in range(count)]
    scores = {}
    for name, values in columns.items():
        numbers = np.float64([0.0 if value is None else value for value in values])
        scores[name] = Scores(numbers, np.array([value is not None for value in values]), "busy")
    return ScoredResponses(responses, scores)


def test_shares_have_wilsons_interval_and_others_students():
    """8 of 10: Wilson [.490162, .943318]. A score is a share when it is 0 or 1 for every response of every policy."""
    eight, none = [1.0] * 8 + [0.0] * 2, [0.0] * 10
    first = scored(correct=eight, gold=eight, length=[1.0] * 10, reward=eight)
    second = scored(correct=none, gold=[0.5] * 10, length=[0.0] * 10, reward=none)
    evaluation = compare({"a": first, "b": second}, sample_count=0)
    scores = evaluation["policies"][0]["scores"]
    assert scores["correct"] == pytest.approx({"mean": 0.8, "low": 0.490162, "high": 0.943318, "n": 10}, abs=1e-6)
    assert scores["gold"]["high"] > 1.0  # not a share: the second policy has halves
    assert evaluation["policies"][1]["scores"]["correct"]["high"] == pytest.approx(
        0.277533, abs=1e-6
    )  # 0 of 10, never [0, 0]
    assert scores["length"]["low"] == scores["length"]["high"] == 1.0 and scores["reward"]["high"] > 1.0
    paired = evaluation["differences"][0]["paired"]
    assert paired["correct"]["mean"] == -0.8 and -1.0 <= paired["correct"]["low"] < paired["correct"]["high"] < 0.0
    assert paired.keys() == {"correct", "gold", "length", "reward"}


def test_a_response_without_a_score_is_left_out_and_counted():
    first, second = (
        scored(gold=[0.2, None, 0.6, 0.9], length=[5, 6, 7, 8]),
        scored(gold=[0.4, 0.5, None, 0.9], length=[5, 5, 9, 7]),
    )
    evaluation = compare({"a": first, "b": second}, sample_count=2)
    assert evaluation["policies"][0]["failed"] == {"gold": 1} and evaluation["policies"][0]["scores"]["gold"]["n"] == 3
    assert evaluation["policies"][0]["scores"]["length"]["n"] == 4
    pair = evaluation["differences"][0]
    assert pair["paired"]["gold"]["n"] == 2 and pair["paired"]["gold"]["mean"] == pytest.approx(0.1)
    assert pair["length_controlled"]["gain"]["n"] == 2
    assert evaluation["samples"][1]["gold"] == {"a": None, "b": 0.5}
    with pytest.raises(RunStopped, match="the score 'gold' failed for every response of a: busy"):
        compare({"a": scored(gold=[None, None], length=[1, 2])}, sample_count=0)
    crossed = {"a": scored(gold=[None, 0.1], length=[1, 2]), "b": scored(gold=[0.1, None], length=[1, 2])}
    with pytest.raises(RunStopped, match="the score 'gold' failed for a or b on every prompt"):
        compare(crossed, sample_count=0)


def test_one_prompt_gives_numbers_without_bounds():
    evaluation = compare({"a": scored(gold=[0.25], length=[3]), "b": scored(gold=[0.5], length=[4])}, sample_count=8)
    assert evaluation["policies"][0]["scores"]["gold"] == {"mean": 0.25, "low": None, "high": None, "n": 1}
    pair = evaluation["differences"][0]
    assert pair["paired"]["gold"] == {"mean": 0.25, "low": None, "high": None, "n": 1}
    assert pair["length_controlled"]["gain"]["mean"] is None and pair["length_controlled"]["slope"] is None
    assert "NaN" not in json_text(evaluation)


def test_every_response_is_kept_with_its_scores():
    rows = completion_rows({"a": scored(gold=[0.2, None]), "b": scored(gold=[1.0, 0.0])})
    assert [(row["policy"], row["id"], row["scores"]["gold"]) for row in rows] == [
        ("a", "q0", 0.2),
        ("a", "q1", None),
        ("b", "q0", 1.0),
        ("b", "q1", 0.0),
    ]
    assert rows[1] == {
        "policy": "a",
        "id": "q1",
        "prompt": "ask 1",
        "response": "say 1",
        "ended": True,
        "scores": {"gold": None},
    }


def test_policies_answer_the_same_prompts():
    with pytest.raises(InputError, match="run.policies: their tokenizers leave out different prompts"):
        compare({"a": scored(gold=[0.2, 0.3]), "b": scored("other", gold=[0.2, 0.3])}, sample_count=0)


def test_json_files_hold_no_nan():
    nan, infinity = float("nan"), float("inf")
    content = {"a": [nan, 1.5, (infinity, -infinity)], "b": {"c": nan}, "d": True, "e": "NaN", "f": np.float64(nan)}
    plain = {"a": [None, 1.5, [None, None]], "b": {"c": None}, "d": True, "e": "NaN", "f": None}
    assert json.loads(json_text(content)) == plain
    assert json_text({"b": 1, "a": 0.1}, sort_keys=True) == '{"a": 0.1, "b": 1}\n'

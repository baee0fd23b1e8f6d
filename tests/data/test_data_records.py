"""Rows to records, and the messages a user gets for rows that cannot be used."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from rlhf_jax.data import (
    GSM8K_FIELDS,
    Comparison,
    Demonstration,
    Fields,
    Message,
    Prompt,
    comparisons,
    demonstrations,
    hh_comparisons,
    prompt_key,
    prompts,
    prompts_of,
)
from rlhf_jax.errors import InputError


def user(text: str) -> tuple[Message, ...]:
    return (Message("user", text),)


def test_demonstration_from_text_and_from_messages() -> None:
    conversation = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    rows = [(1, {"prompt": "hi", "response": "hello"}), (4, {"id": 7, "prompt": conversation, "response": "yes"})]
    records, dropped = demonstrations(rows, source="some/where.jsonl")
    assert records == [
        Demonstration("where.jsonl:1", user("hi"), "hello"),
        Demonstration("7", (Message("system", "Be brief."), Message("user", "hi")), "yes"),
    ]
    assert dropped == Counter()


def test_conversation_column() -> None:
    chat = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    fields = Fields(messages="chat", role="from", content="value")
    records, _ = demonstrations([(1, {"chat": chat})], fields, source="f")
    assert records == [Demonstration("f:1", user("a"), "b")]
    with pytest.raises(InputError, match="f:1: last message is not a response"):
        demonstrations([(1, {"chat": chat[:1]})], fields, source="f")


def test_gsm8k_and_plain_text_and_extra() -> None:
    row = {"question": "1 + 1?", "answer": "2\n#### 2"}
    assert demonstrations([(1, row)], GSM8K_FIELDS, source="g")[0][0].response == "2\n#### 2"
    assert prompts([(1, row)], GSM8K_FIELDS, source="g")[0] == [Prompt("g:1", user("1 + 1?"), {"answer": "2\n#### 2"})]
    plain, _ = demonstrations([(3, {"text": "a film"})], Fields(prompt=None, response="text"), source="t")
    assert plain == [Demonstration("t:3", (), "a film")]


def test_comparison_with_margin_and_response_messages() -> None:
    reply = {"role": "assistant", "content": "good"}
    row = {"prompt": "q", "chosen": [reply], "rejected": "bad", "margin": "0.5"}
    records, _ = comparisons([(1, row)], Fields(margin="margin"), source="c")
    assert records == [Comparison("c:1", user("q"), "good", "bad", 0.5)]
    assert comparisons([(1, row)], source="c")[0][0].margin == 0.0


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "q"}, "f.jsonl:9: field 'response' is missing; the row has 'prompt'"),
        ({"prompt": "q", "response": None}, "f.jsonl:9: field 'response' is null; fill it in"),
        ({"prompt": "q", "response": 3}, "f.jsonl:9: field 'response' is int, not text"),
        ({"prompt": 3.5, "response": "a"}, "f.jsonl:9: field 'prompt' is float, not text or messages"),
        ({"prompt": " ", "response": "a"}, "f.jsonl:9: field 'prompt' is empty"),
        ({"prompt": [], "response": "a"}, "f.jsonl:9: field 'prompt' is empty"),
        ({"prompt": ["hi"], "response": "a"}, "f.jsonl:9: field 'prompt', message 1: must be an object"),
        ({"prompt": [{"role": "bot", "content": "a"}], "response": "a"}, "message 1: role 'bot' is unknown"),
        ({"prompt": [{"role": "user", "content": 3}], "response": "a"}, "message 1: content is int, not text"),
        ({"prompt": [{"role": "assistant", "content": "a"}], "response": "a"}, "not the user's"),
        ({"prompt": "q", "response": "\n"}, "f.jsonl:9: field 'response' is empty"),
    ],
)
def test_bad_rows_name_line_field_and_remedy(row: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        demonstrations([(9, row)], source="f.jsonl")
    assert message in str(caught.value)
    assert ";" in str(caught.value) and "\n" not in str(caught.value)


def test_unusable_rows_are_an_error_or_dropped_and_counted() -> None:
    rows: list[tuple[int, dict[str, Any]]] = [
        (1, {"prompt": "q", "chosen": "a", "rejected": "a"}),
        (2, {"prompt": "q", "chosen": "", "rejected": "a"}),
        (3, {"prompt": "q", "chosen": "b", "rejected": "a"}),
        (4, {"prompt": "q", "chosen": "b"}),
    ]
    with pytest.raises(InputError, match="f:1: chosen equals rejected"):
        comparisons(rows, source="f")
    records, dropped = comparisons(rows, source="f", unusable="drop")
    assert [record.id for record in records] == ["f:3"]
    counts = {"chosen equals rejected": 1, "field 'chosen' is empty": 1, "field 'rejected' is missing": 1}
    assert dropped == Counter(counts) and dropped.first.startswith("f:1: chosen equals rejected; ")
    with pytest.raises(InputError, match="unusable = 'ignore'"):
        comparisons(rows, source="f", unusable="ignore")  # type: ignore[arg-type]


@pytest.mark.parametrize("margin", ["much", float("nan"), float("inf"), True, [1]])
def test_margin_must_be_a_finite_number(margin: object) -> None:
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "m": margin}
    with pytest.raises(InputError, match="f:1: field 'm' is"):
        comparisons([(1, row)], Fields(margin="m"), source="f")


def test_responses_that_were_cut_off() -> None:
    row = {"prompt": "q", "response": "r", "chosen": "a", "rejected": "b"}
    (plain,), _ = demonstrations([(1, row | {"ended": None})], source="d.jsonl")
    (cut,), _ = demonstrations([(1, row | {"ended": False})], source="d.jsonl")
    assert (plain.ended, cut.ended) == (True, False)
    (pair,), _ = comparisons([(1, row | {"rejected_ended": False})], source="c.jsonl")
    assert (pair.chosen_ended, pair.rejected_ended) == (True, False)
    (renamed,), _ = comparisons([(1, row | {"chosen_done": False})], Fields(ended="done"), source="c.jsonl")
    assert (renamed.chosen_ended, renamed.rejected_ended) == (False, True)
    with pytest.raises(
        InputError, match=r"d.jsonl:1: field 'ended' is str, not true or false; name another Fields.ended"
    ):
        demonstrations([(1, row | {"ended": "no"})], source="d.jsonl")


def test_repeated_ids_are_refused() -> None:
    rows = [(1, {"id": "x", "prompt": "a"}), (2, {"id": "x", "prompt": "b"})]
    with pytest.raises(InputError, match="f:2: id 'x' is also that of line 1"):
        prompts(rows, source="f")


def hh(chosen: str, rejected: str) -> tuple[list[Comparison], Counter[str]]:
    return hh_comparisons([(1, {"chosen": chosen, "rejected": rejected})], source="hh")


def test_hh_prompt_runs_through_the_last_shared_assistant_header() -> None:
    shared = "\n\nHuman: one\n\nAssistant: two\n\nHuman: three\n\nAssistant:"
    # Both replies begin with " I ", which belongs to the replies although it is shared.
    records, dropped = hh(shared + " I do", shared + " I don't")
    turns = (Message("user", "one"), Message("assistant", "two"), Message("user", "three"))
    assert records == [Comparison("hh:1", turns, "I do", "I don't")]
    assert not dropped


def test_hh_neighbouring_turns_of_one_speaker_are_joined() -> None:
    shared = "\n\nHuman: a\n\nHuman: b\n\nAssistant:"
    assert hh(shared + " x", shared + " y")[0][0].prompt == user("a\n\nb")


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        ("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant: b", "chosen equals rejected"),
        ("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant:", "field 'rejected' is empty"),
        ("a", "b", "the dialogues share no turn"),
        (
            "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
            "\n\nHuman: a\n\nAssistant: e",
            "the dialogues part before the last response",
        ),
        ("\n\nAssistant: b", "\n\nAssistant: c", "no question before the response"),
        ("x\n\nHuman: a\n\nAssistant: b", "x\n\nHuman: a\n\nAssistant: c", "text before the first turn"),
    ],
)
def test_hh_unusable_rows_are_counted(chosen: str, rejected: str, reason: str) -> None:
    assert hh(chosen, rejected) == ([], Counter({reason: 1}))


def test_prompts_of_keeps_the_first_of_equal_prompts() -> None:
    records = [Demonstration("1", user("Hi  there"), "a"), Demonstration("2", user("hi there\n"), "b")]
    records.append(Demonstration("3", user("bye"), "c"))
    assert prompts_of(records) == [Prompt("1", user("Hi  there")), Prompt("3", user("bye"))]
    assert prompt_key(user("a")) != prompt_key((Message("system", "a"),))


def test_message_role_is_checked() -> None:
    with pytest.raises(InputError, match="role 'critic'"):
        Message("critic", "x")


def test_columns_for_a_reward_may_be_any_json_value() -> None:
    """A verifier needs lists of tests, a judge a rubric; null is a value of its own."""
    row = {"prompt": "q", "tests": [{"in": [1, 2], "out": None}], "rubric": {"strict": True}, "note": None, "best": 0.5}
    fields = Fields(extra=("tests", "rubric", "note", "best"))
    (record,), _ = prompts([(1, row)], fields, source="p")
    assert record.extra == {name: row[name] for name in fields.extra}
    (record,), _ = prompts([(1, {"prompt": "q", "tests": np.array([[1, 2]])})], Fields(extra=("tests",)), source="p")
    assert record.extra == {"tests": [[1, 2]]}
    deep: Any = 1
    for _ in range(5000):
        deep = [deep]
    for value, words in ((deep, "is nested too deeply"), (object(), "holds object, which is no JSON value")):
        with pytest.raises(InputError, match=f"p:1: field 'tests' {words}"):
            prompts([(1, {"prompt": "q", "tests": value})], Fields(extra=("tests",)), source="p")
    with pytest.raises(InputError, match="p:1: field 'tests' is missing; the row has 'prompt': set Fields.extra"):
        prompts([(1, {"prompt": "q"})], Fields(extra=("tests",)), source="p")

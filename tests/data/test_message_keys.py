"""Keys of messages besides role and content: they reach the record, or the row is unusable, by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rlhf_jax.data import (
    Comparison,
    Demonstration,
    Fields,
    Message,
    Prompt,
    comparisons,
    demonstrations,
    prompt_column,
    prompt_key,
    prompts,
    prompts_of,
)
from rlhf_jax.errors import InputError

CHAT = Fields(messages="messages")
CALL = {"type": "function", "id": "c1", "function": {"name": "order_state", "arguments": '{"order": 77}'}}
TOOL = {"type": "function", "function": {"name": "order_state", "parameters": {"type": "object"}}}


def read(*messages: dict[str, Any], **row: Any) -> Demonstration:
    records, _ = demonstrations([(1, {"messages": list(messages)} | row)], CHAT, source="f")
    return records[0]


def user(text: str, **keys: Any) -> dict[str, Any]:
    return {"role": "user", "content": text} | keys


def assistant(text: str | None, **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text} | keys


def test_every_key_is_kept() -> None:
    record = read(user("q", name="Ann", mood=None), assistant("a", reasoning_content="why", id=7))
    assert record.prompt == (Message("user", "q", {"name": "Ann"}),)
    assert record.messages[-1] == Message("assistant", "a", {"reasoning_content": "why", "id": 7})


@pytest.mark.parametrize("name", ["weight", "loss", "trainable", "train"])
def test_weights(name: str) -> None:
    talk = (user("q", **{name: False}), assistant("a", **{name: 0}), user("r"), assistant("b", **{name: 1}))
    record = read(*talk)
    assert [message.learned for message in record.messages] == [False, False, True, True]
    assert all(not message.keys for message in record.messages)
    assert not read(user("q"), assistant("a", **{name: 0.0})).learned
    for value, reason in ((0.5, "neither 0 nor 1"), ("no", "neither 0 nor 1")):
        with pytest.raises(InputError, match=f"message 2: {name} is {reason}"):
            read(user("q"), assistant("a", **{name: value}))
    with pytest.raises(InputError, match=f"message 1: {name} is 1 for a turn of the user"):
        read(user("q", **{name: 1}), assistant("a"))
    with pytest.raises(InputError, match=f"field '{'chosen'}' has weight 0"):
        comparisons([(1, {"prompt": "q", "chosen": assistant("a", **{name: 0}), "rejected": "b"})], source="f")


def test_weights_that_contradict_each_other() -> None:
    with pytest.raises(InputError, match="weight and train contradict each other"):
        read(user("q"), assistant("a", weight=0, train=True))


@pytest.mark.parametrize("content", [None, "", "One moment."])
def test_calls_and_results(content: str | None) -> None:
    result = {"role": "tool", "tool_call_id": "c1", "content": "left the depot"}
    record = read(user("Where?"), assistant(content, tool_calls=[CALL]), result, assistant("Gone."), tools=[TOOL])
    keys = {"tool_calls": [CALL]} | ({"content": None} if content is None else {})
    assert record.prompt[1:] == (
        Message("assistant", content or "", keys),
        Message("tool", "left the depot", {"tool_call_id": "c1"}),
    )
    assert record.tools == (TOOL,)
    assert read(user("Where?"), assistant(content, tool_calls=[CALL])).messages[-1] == record.prompt[1]
    assert read(user("Where?"), {"role": "assistant", "tool_calls": [CALL]}).response == ""


def test_tables_hold_calls_and_tools_as_text() -> None:
    record = read(user("q"), assistant("", tool_calls=json.dumps([CALL])), tools=json.dumps([TOOL]))
    assert record.keys == {"tool_calls": [CALL]} and record.tools == (TOOL,)
    records, _ = prompts([(1, {"prompt": "q", "tools": [TOOL]}), (2, {"prompt": "r", "tools": None})], source="f")
    assert [prompt.tools for prompt in records] == [(TOOL,), ()]
    unread, _ = prompts([(1, {"prompt": "q", "tools": ["hammer"]})], Fields(tools=None), source="f")
    assert unread == [Prompt("f:1", (Message("user", "q"),))]


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"tool_calls": "order_state"}, "tool_calls is no list of calls with names"),
        ({"tool_calls": [{"function": "order_state"}]}, "tool_calls is no list of calls with names"),
        ({"tool_calls": {"name": "order_state"}}, "tool_calls is no list of calls with names"),
        ({"reasoning_content": ["why"]}, "reasoning_content is list, not text"),
    ],
)
def test_keys_that_say_something_are_checked(keys: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=f"f:1: field 'messages', message 2: {reason}"):
        read(user("q"), assistant("a", **keys))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('[{"name": "f", "x": "\\ud800"}]', "holds half of a surrogate pair"),
        ('[{"name": "f", "name": "g"}]', r"occurs twice \('name'\)"),
        ('[{"name": "f", "x": NaN}]', "holds nan, not a finite number"),
        ('[{"name": "f", "x": ' + "9" * 5000 + "}]", "holds inf"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_lists_held_as_text_are_read_as_strictly_as_rows(text: str, reason: str) -> None:
    with pytest.raises(InputError, match=f"^f:1: .*{reason}"):
        read(user("q"), assistant("a", tool_calls=text))
    with pytest.raises(InputError, match=f"^f:1: .*{reason}"):
        read(user("q"), assistant("a"), tools=text)


def test_thoughts_under_two_names_are_one() -> None:
    assert read(user("q"), assistant("a", reasoning_content="why", thinking="why")).response == "a"
    with pytest.raises(InputError, match="message 2: reasoning_content and thinking differ; keep one of them"):
        read(user("q"), assistant("a", reasoning_content="why", thinking="how"))


def test_the_old_form_of_a_call_is_refused_with_the_new() -> None:
    """Templates read tool_calls only: the call would be gone."""
    for content in ("a", None):
        with pytest.raises(InputError, match="message 2: function_call .*; write it as tool_calls"):
            read(user("q"), assistant(content, function_call={"name": "f", "arguments": "{}"}))


def test_a_message_without_content_or_call_is_refused() -> None:
    with pytest.raises(InputError, match="message 2: content is null"):
        read(user("q"), assistant(None, tool_calls=[]), user("r"), assistant("a"))
    with pytest.raises(InputError, match="is empty"):
        read(user("q"), assistant("", tool_calls=[]))
    with pytest.raises(InputError, match="'tools' is no list of functions"):
        read(user("q"), assistant("a"), tools=["hammer"])


def test_responses_of_comparisons_keep_their_keys() -> None:
    chosen, rejected = assistant("a", reasoning_content="why"), assistant("a", reasoning_content="why not")
    records, _ = comparisons(
        [(1, {"prompt": "q", "chosen": [chosen], "rejected": rejected, "tools": [TOOL]})], source="f"
    )
    prompt, reasons = (Message("user", "q"),), ({"reasoning_content": "why"}, {"reasoning_content": "why not"})
    assert records == [
        Comparison("f:1", prompt, "a", "a", chosen_keys=reasons[0], rejected_keys=reasons[1], tools=(TOOL,))
    ]
    with pytest.raises(InputError, match="field 'chosen' is a turn of the user, no response"):
        comparisons([(1, {"prompt": "q", "chosen": [user("a")], "rejected": "b"})], source="f")


def test_a_prompt_column_is_read_back() -> None:
    talk = (
        Message("user", "q", {"name": "Ann"}),
        Message("assistant", "", {"tool_calls": [CALL], "content": None}, learned=False),
        Message("tool", "left", {"tool_call_id": "c1"}),
    )
    records, _ = prompts([(1, {"prompt": json.loads(json.dumps(prompt_column(talk)))})], source="f")
    assert records[0].prompt == talk


def test_prompts_with_other_calls_are_other_prompts() -> None:
    talks = [(Message("user", "q"), Message("assistant", "", {"tool_calls": [{"name": name}]})) for name in "ab"]
    assert prompt_key(talks[0]) != prompt_key(talks[1])
    assert prompts_of([Demonstration("1", talks[0], "x", tools=(TOOL,))]) == [Prompt("1", talks[0], tools=(TOOL,))]

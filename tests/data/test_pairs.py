"""Comparisons whose sides are whole conversations: the turns that both share are the prompt."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf_jax.data import Comparison, Fields, Message, comparisons
from rlhf_jax.errors import InputError

SYSTEM = {"role": "system", "content": "Be brief."}


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def talk(response: str, *before: dict[str, str]) -> list[dict[str, str]]:
    return [*before, turn("user", "Is rain wet?"), turn("assistant", response)]


def make_comparison(row: dict[str, Any], fields: Fields | None = None) -> Comparison:
    records, _ = comparisons([(1, row)], fields, source="pairs.jsonl")
    return records[0]


PAIR = {"chosen": talk("Yes, it is."), "rejected": talk("Who knows.")}
QUESTION = (Message("user", "Is rain wet?"),)


@pytest.mark.parametrize(
    "prompt",
    [{}, {"prompt": None}, {"prompt": "Is rain wet?\n"}, {"prompt": [turn("user", "Is rain wet?")]}],
    ids=["no column", "null", "text", "messages"],
)
@pytest.mark.parametrize("fields", [None, Fields(prompt=None)], ids=["Fields()", "prompt = None"])
def test_the_shared_turns_are_the_prompt(prompt: dict[str, Any], fields: Fields | None) -> None:
    assert make_comparison(prompt | PAIR, fields) == Comparison("pairs.jsonl:1", QUESTION, "Yes, it is.", "Who knows.")


def test_system_message_and_earlier_turns_are_shared() -> None:
    before = (SYSTEM, turn("user", "Hi."), turn("assistant", "Hello."))
    record = make_comparison({"chosen": talk("Yes.", *before), "rejected": talk("No.", *before)})
    assert [message.role for message in record.prompt] == ["system", "user", "assistant", "user"]
    assert (record.chosen, record.rejected) == ("Yes.", "No.")


def test_messages_with_other_keys() -> None:
    sides = {side: [{"from": "human", "value": "q"}, {"from": "gpt", "value": side}] for side in ("chosen", "rejected")}
    record = make_comparison(sides, Fields(role="from", content="value"))
    assert (record.prompt, record.chosen) == ((Message("user", "q"),), "chosen")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": talk("a", SYSTEM), "rejected": talk("b")}, "part before their last message; keep only the turns"),
        ({"chosen": talk("a"), "rejected": talk("a")}, "chosen equals rejected"),
        ({"chosen": talk("a"), "rejected": "b"}, "the other is not; write both alike"),
        (PAIR | {"prompt": "Is snow wet?"}, "set Fields.prompt = None to take the turns that both share"),
        (
            {"chosen": [*talk("a"), turn("user", "x")], "rejected": [*talk("a"), turn("user", "y")]},
            "last message of field 'chosen' is not a response",
        ),
        (
            {"chosen": [SYSTEM, turn("assistant", "a")], "rejected": [SYSTEM, turn("assistant", "b")]},
            "last message of the prompt is not the user's",
        ),
        ({"chosen": talk(""), "rejected": talk("b")}, "field 'chosen' is empty"),
        ({"chosen": [], "rejected": [], "prompt": "q"}, "field 'chosen' is empty"),
        ({"chosen": None, "rejected": talk("b")}, "field 'chosen' is null"),
    ],
)
def test_conversations_that_are_no_pair(row: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        make_comparison(row)
    assert str(caught.value).startswith("pairs.jsonl:1: ") and message in str(caught.value)
    records, dropped = comparisons([(1, row)], source="pairs.jsonl", unusable="drop")
    assert not records and dropped.total() == 1

"""Readers of a message's text, other keys and weight, and of the tools of a conversation.

Every key is passed to the chat template, as by `apply_chat_template` of transformers, or to the loss mask, or is an error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_jax.data.row_problems import UnusableRow, check_value, parse_json
from rlhf_jax.records import SAYING_KEYS

WEIGHTS = ("weight", "loss", "trainable", "train")
"""Names of a message's weight in the loss: 0 or false for a turn that is not learned, 1 or true for others."""


def content_of(item: Mapping[str, Any], name: str, at: str) -> str:
    """Return the text of a message; "" for one that has none and calls a tool or reasons. Raises UnusableRow."""
    content = item.get(name)
    if content is None and any(item.get(key) for key in SAYING_KEYS):
        return ""
    if content is None:
        raise UnusableRow(f"{at}: content is null", "fill it in or remove the row")
    if not isinstance(content, str):
        raise UnusableRow(f"{at}: content is {type(content).__name__}, not text", "write it as one text")
    return content


def keys_of(item: Mapping[str, Any], role: str, content: str, at: str) -> dict[str, Any]:
    """Return the other keys of a message that have a value. role, content: names of the keys of role and text.

    A "content" of None stays: chat templates distinguish a message without content from one with "". Raises
    UnusableRow.
    """
    reserved = {role, content, "role", "content", *WEIGHTS}
    keys = {name: value for name, value in item.items() if name not in reserved and value is not None}
    if item.get(content) is None:
        keys["content"] = None
    thoughts = {name: keys[name] for name in SAYING_KEYS[1:] if name in keys}
    for name, thought in thoughts.items():
        if not isinstance(thought, str):
            raise UnusableRow(f"{at}: {name} is {type(thought).__name__}, not text", "write it as one text")
    if len(set(thoughts.values())) > 1:
        raise UnusableRow(f"{at}: {' and '.join(thoughts)} differ", "keep one of them: a template writes one")
    if "function_call" in keys:
        raise UnusableRow(f"{at}: function_call is no key that chat templates write", "write it as tool_calls")
    if "tool_calls" in keys:
        keys["tool_calls"] = _read_calls(keys["tool_calls"], at)
    return keys


def learned_of(item: Mapping[str, Any], role: str, at: str) -> bool:
    """Return whether a message may be a target, by its weight; True without one. Raises UnusableRow."""
    weights = {name: item[name] for name in WEIGHTS if item.get(name) is not None}
    for name, value in weights.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise UnusableRow(
                f"{at}: {name} is neither 0 nor 1",
                "only whole turns are learned or not; rename the key",
                f" ({value!r:.40})",
            )
        if value and role != "assistant":
            raise UnusableRow(
                f"{at}: {name} is 1 for a turn of the {role}", "only turns of the assistant are learned; remove it"
            )
    if len({bool(value) for value in weights.values()}) > 1:
        raise UnusableRow(f"{at}: {' and '.join(weights)} contradict each other", "keep one of them")
    return all(weights.values())


def tools_of(row: Mapping[str, Any], name: str | None) -> tuple[Mapping[str, Any], ...]:
    """Return the JSON schemas of the functions in a column, a list or its JSON; () where the row has none.

    Raises UnusableRow.
    """
    value = None if name is None else row.get(name)
    if value is None or value == "":
        return ()
    tools = _parse_text(value, name)
    if _have_names(tools):
        return tuple(tools)
    raise UnusableRow(
        f"field {name!r} is no list of functions with names", "write JSON schemas, or set Fields.tools = None"
    )


def _read_calls(value: Any, at: str) -> list[Any]:
    calls = _parse_text(value, "tool_calls")
    if _have_names(calls):
        return list(calls)
    raise UnusableRow(f"{at}: tool_calls is no list of calls with names", "write them as OpenAI does")


def _have_names(value: Any) -> bool:
    """Return whether ``value`` is a list of functions, or of calls, that all have a name."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        return False
    inner = [item.get("function", item) if isinstance(item, Mapping) else None for item in value]
    return all(isinstance(item, Mapping) and isinstance(item.get("name"), str) for item in inner)


def _parse_text(value: Any, name: str | None) -> Any:
    """Parse ``value`` as JSON if it is a text (csv files have lists as text). Raises UnusableRow for values no record can hold."""
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except json.JSONDecodeError:
            return value
    check_value(value, str(name))
    return value

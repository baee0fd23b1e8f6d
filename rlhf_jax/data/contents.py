"""Checks that a rendering contains all of its messages, so that no part of them is lost in a template silently."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rlhf_jax.data.quotes import remove_marks
from rlhf_jax.data.row_problems import UnusableRecord
from rlhf_jax.data.templates import Template
from rlhf_jax.records import SAYING_KEYS, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


REASONING = SAYING_KEYS[1:]
"""Names of a message's reasoning in transformers; a template that reads one of them is given all."""


def check_rendered(message: Message, rendering: str, part: str) -> None:
    """Raise UnusableRecord when ``rendering`` lacks a part of ``message``. part: name of the message, for the error."""
    text = remove_marks(rendering)
    remedy = "use a template that writes messages whole, or style='plain' (what is thought may be reasoning_content)"
    if message.content.strip() not in text:
        raise UnusableRecord(f"the template changes or leaves out the content of a {part}", remedy)
    if reasoning_of(message).strip() not in text:
        raise UnusableRecord(f"the template leaves out reasoning_content of a {part}", remedy)
    if not all(occurs_in(value, text) for value in leaf_values(message.keys.get("tool_calls") or [])):
        raise UnusableRecord(f"the template leaves out tool_calls of a {part}", remedy)


def check_tools(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], source: str, text: str) -> None:
    """Raise UnusableRecord for tools, calls of tools, results of tools and reasoning that a chat template ignores.

    source: the chat template.
    text: the rendering of ``messages``.
    """
    remedy = "use a chat template that writes it, or remove it from the data"
    if any(reasoning_of(message) for message in messages) and not names_key(source, REASONING[0]):
        raise UnusableRecord("the chat template does not read reasoning_content", remedy)
    names = [leaf for tool in tools for leaf in leaf_values(tool.get("function", tool).get("name"))]
    if not all(occurs_in(name, text) for name in names) or (tools and not names_key(source, "tools")):
        raise UnusableRecord("the chat template leaves out the tools", remedy)
    for message in messages:
        calls = message.keys.get("tool_calls") or []
        if not all(occurs_in(call.get("function", call).get("name"), text) for call in calls):
            raise UnusableRecord("the chat template leaves out tool_calls", remedy)
        if message.role == "tool" and not occurs_in(message.content.strip(), text):
            raise UnusableRecord("the chat template leaves out the message of a tool", remedy)


def unread_keys(messages: Iterable[Message], tokenizer: PreTrainedTokenizerBase, template: Template) -> Counter[str]:
    """Count the keys of ``messages`` that the template does not read."""
    source = str(tokenizer.chat_template) if template.style == "chat" else ""
    keys = Counter(key for message in messages for key, value in message.keys.items() if value is not None)
    return Counter({key: count for key, count in keys.items() if not names_key(source, key)})


def reasoning_of(message: Message) -> str:
    """Return the reasoning of a message; "" when it has none."""
    value = next((message.keys[name] for name in REASONING if message.keys.get(name) is not None), "")
    return value if isinstance(value, str) else json.dumps(value)


def names_key(source: str, key: str) -> bool:
    """Return whether a chat template contains ``key`` or an alternative name of it."""
    names = REASONING if key in REASONING else (key,)
    return any(re.search(rf"\b{re.escape(name)}\b", source) for name in names)


def leaf_values(value: Any) -> list[Any]:
    """List the texts and numbers inside a JSON value, without ids and types of calls, which templates may omit."""
    if isinstance(value, Mapping):
        return [leaf for key, item in value.items() if key not in ("id", "type") for leaf in leaf_values(item)]
    if isinstance(value, list | tuple):
        return [leaf for item in value for leaf in leaf_values(item)]
    return [] if value is None or isinstance(value, bool) else [value]


def occurs_in(value: Any, text: str) -> bool:
    """Return whether a text or number occurs in ``text``, unchanged or as JSON."""
    if not isinstance(value, str):
        return json.dumps(value) in text
    if value.strip() in text or any(json.dumps(value, ensure_ascii=ascii)[1:-1] in text for ascii in (False, True)):
        return True
    try:  # arguments of a call are a JSON text, which a template may format in another way
        inner = json.loads(value)
    except (ValueError, RecursionError):
        return False
    return isinstance(inner, dict | list) and all(occurs_in(leaf, text) for leaf in leaf_values(inner))

"""Whether a rendering holds what messages say: what a template leaves out is never learned silently."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rlhf_jax.data.quotes import unmarked
from rlhf_jax.data.row_problems import UnusableRecord
from rlhf_jax.data.templates import Template
from rlhf_jax.records import SAYING_KEYS, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


REASONING = SAYING_KEYS[1:]
"""Names of a message's reasoning, as transformers knows them: a template that reads one reads them all."""


def check_written(message: Message, rendering: str, what: str) -> None:
    """Raises UnusableRecord when ``rendering`` lacks something that ``message`` says."""
    text = unmarked(rendering)
    remedy = "use a template that writes messages whole, or style='plain' (what is thought may be reasoning_content)"
    if message.content.strip() not in text:
        raise UnusableRecord(f"the template changes or leaves out the content of a {what}", remedy)
    if reasoning_of(message).strip() not in text:
        raise UnusableRecord(f"the template leaves out reasoning_content of a {what}", remedy)
    if not all(is_written(value, text) for value in leaves(message.keys.get("tool_calls") or [])):
        raise UnusableRecord(f"the template leaves out tool_calls of a {what}", remedy)


def check_tools(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], source: str, text: str) -> None:
    """Raises UnusableRecord for tools, calls of tools, results of tools and reasoning that a chat template ignores.

    source: of the chat template. text: the rendering of ``messages``.
    """
    remedy = "use a chat template that writes it, or remove it from the data"
    if any(reasoning_of(message) for message in messages) and not reads(source, REASONING[0]):
        raise UnusableRecord("the chat template does not read reasoning_content", remedy)
    names = [leaf for tool in tools for leaf in leaves(tool.get("function", tool).get("name"))]
    if not all(is_written(name, text) for name in names) or (tools and not reads(source, "tools")):
        raise UnusableRecord("the chat template leaves out the tools", remedy)
    for message in messages:
        calls = message.keys.get("tool_calls") or []
        if not all(is_written(call.get("function", call).get("name"), text) for call in calls):
            raise UnusableRecord("the chat template leaves out tool_calls", remedy)
        if message.role == "tool" and not is_written(message.content.strip(), text):
            raise UnusableRecord("the chat template leaves out the message of a tool", remedy)


def unread_keys(messages: Iterable[Message], tokenizer: PreTrainedTokenizerBase, template: Template) -> Counter[str]:
    """Count the keys of ``messages`` that the template does not read."""
    source = str(tokenizer.chat_template) if template.style == "chat" else ""
    keys = Counter(key for message in messages for key, value in message.keys.items() if value is not None)
    return Counter({key: count for key, count in keys.items() if not reads(source, key)})


def reasoning_of(message: Message) -> str:
    """Return what a message says it thought; "" for nothing."""
    value = next((message.keys[name] for name in REASONING if message.keys.get(name) is not None), "")
    return value if isinstance(value, str) else json.dumps(value)


def reads(source: str, key: str) -> bool:
    """Whether a chat template names ``key``, or another name of the same thing."""
    names = REASONING if key in REASONING else (key,)
    return any(re.search(rf"\b{re.escape(name)}\b", source) for name in names)


def leaves(value: Any) -> list[Any]:
    """The texts and numbers inside a JSON value, without ids and types of calls, which templates may leave out."""
    if isinstance(value, Mapping):
        return [leaf for key, item in value.items() if key not in ("id", "type") for leaf in leaves(item)]
    if isinstance(value, list | tuple):
        return [leaf for item in value for leaf in leaves(item)]
    return [] if value is None or isinstance(value, bool) else [value]


def is_written(value: Any, text: str) -> bool:
    """Whether a text or number stands in ``text``, as it is or as JSON writes it."""
    if not isinstance(value, str):
        return json.dumps(value) in text
    if value.strip() in text or any(json.dumps(value, ensure_ascii=ascii)[1:-1] in text for ascii in (False, True)):
        return True
    try:  # arguments of a call, a text of JSON, which a template may write anew
        inner = json.loads(value)
    except (ValueError, RecursionError):
        return False
    return isinstance(inner, dict | list) and all(is_written(leaf, text) for leaf in leaves(inner))

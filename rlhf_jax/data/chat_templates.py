"""Conversations written by the tokenizer's chat template, and responses after the prompts that a sampler continues."""

from __future__ import annotations

import dataclasses
import os
import re
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import TemplateError

from rlhf_jax.data import sandbox
from rlhf_jax.data.quotes import Quotes, unmarked
from rlhf_jax.data.row_problems import UnusableRecord
from rlhf_jax.data.special_tokens import quotes_of
from rlhf_jax.data.templates import GIVEN_VARIABLES, Template, parse_date, plain_texts
from rlhf_jax.data.written import check_written, reasoning_of
from rlhf_jax.errors import InputError
from rlhf_jax.records import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_STAND_IN = "A response."
_PROBE = (Message("user", "1"), Message("assistant", "2"), Message("user", "3"))
_QUOTES: weakref.WeakKeyDictionary[Any, dict[tuple[int, str, str], Quotes]] = weakref.WeakKeyDictionary()
"""Of tokenizers, by all that they depend on: every record asks."""


class Format(NamedTuple):
    """A tokenizer's way to write messages, as ``template`` asks."""

    tokenizer: PreTrainedTokenizerBase
    template: Template
    tools: Sequence[Mapping[str, Any]]
    quotes: Quotes


def format_of(tokenizer: PreTrainedTokenizerBase, template: Template, tools: Sequence[Mapping[str, Any]]) -> Format:
    """Bundle how messages are written. Raises InputError for a damaged chat template."""
    known = _QUOTES.setdefault(tokenizer, {})
    key = (len(tokenizer), str(tokenizer.chat_template), repr(template))
    if key not in known:
        known[key] = _quotes(tokenizer, template)
    return Format(tokenizer, template, tools, known[key])


def render_chat(messages: Sequence[Message], form: Format, *, generation: bool) -> str:
    """Write a conversation with the chat template, its quotes marked. generation: with the header of a response at its end.

    Raises UnusableRecord when the template refuses these messages, InputError when it can write none.
    """
    tokenizer, template = form.tokenizer, form.template
    source = source_of(form)
    unknown = sorted(template.arguments.keys() - variables_of(tokenizer, source))
    if unknown:
        reads = ", ".join(
            sorted(variables_of(tokenizer, source) - set(GIVEN_VARIABLES) - set(tokenizer.special_tokens_map))
        )
        raise InputError(
            f"Template.arguments: the chat template reads no {unknown[0]!r}; "
            + (f"it reads {reads}" if reads else "it reads none, unset it")
        )
    variables = {
        **tokenizer.special_tokens_map,
        **template.arguments,
        "messages": [_as_data(message, form) for message in messages],
        "tools": marked(list(form.tools), form, is_response=False) if form.tools else None,
        "documents": None,
        "add_generation_prompt": generation,
    }
    date = None if template.date is None else parse_date(template.date)
    try:
        return sandbox.render(source, variables, date)
    except TemplateError as error:
        roles = ", ".join(message.role for message in messages) or "no messages"
        raise UnusableRecord(
            f"{name_of(tokenizer)}: chat template refuses [{roles}] ({error})", "use style='plain'"
        ) from None


def render_chat_response(messages: Sequence[Message], message: Message, form: Format) -> str:
    """Write what follows the prompt in a conversation that ends with ``message``. Raises UnusableRecord."""
    try:
        text = _response_after_prompt(messages, message, form)
        # A prompt that ends with "<think>" holds the beginning of a response that begins so.
        prompt, length = unmarked(render_chat(messages, form, generation=True)), len(message.content.strip()) or 1
        check_written(message, prompt[max(len(prompt) - length + 1, 0) :] + text, "response")
        return text
    except UnusableRecord:
        framed = _framed_response(messages, message, form)
        if framed is None:
            raise
        return framed


def _response_after_prompt(messages: Sequence[Message], message: Message, form: Format) -> str:
    """What a chat template writes of a response, after the prompt that a sampler continues.

    Some templates put an empty "<think></think>" at the end of a prompt and leave it out of a conversation: the response
    is then what follows the header that both have.
    """
    prompt = render_chat(messages, form, generation=True)
    full = render_chat([*messages, message], form, generation=False)
    before = "" if full.startswith(prompt) else render_chat(messages, form, generation=False)
    if before and full.startswith(before) and prompt.startswith(before):
        header, rest = prompt[len(before) :], full[len(before) :]
        content = str(marked(message.content, form, is_response=True))
        shared = len(os.path.commonprefix([header, rest]))  # noqa: RUF071  (of characters, as meant)
        begin = rest.rfind(content, 0, shared + len(content)) if content.strip() else -1
        if begin >= 0 and header.startswith(rest[:begin]) and _closes_its_tags(header[begin:]):
            return rest[begin:]
    return remainder(full, prompt, form.tokenizer)


def _framed_response(messages: Sequence[Message], message: Message, form: Format) -> str | None:
    """A response as the data has it, in what the chat template writes around one.

    For templates that write only a part of a response, as those of reasoning models keep what follows "</think>": a sampler
    writes the whole of it. None when the text would not begin as the prompt that a sampler continues.
    """
    if message.has_calls_or_reasoning or not message.content.strip():
        return None
    stand_in = dataclasses.replace(message, content=_STAND_IN)
    before, prompt = (render_chat(messages, form, generation=generation) for generation in (False, True))
    full = render_chat([*messages, stand_in], form, generation=False)
    head, found, tail = full[len(before) :].partition(_STAND_IN)
    whole = before + head + str(marked(message.content, form, is_response=True)) + tail
    if not (found and full.startswith(before) and prompt.startswith(before + head) and whole.startswith(prompt)):
        return None
    return whole[len(prompt) :]


def _closes_its_tags(text: str) -> bool:
    """Whether ``text`` is whole: "<think></think>" is, and after "<think>" a thought is to follow."""
    opened, closed = (sorted(re.findall(pattern, text)) for pattern in (r"<(\w+)>", r"</(\w+)>"))
    return opened == closed


def remainder(full: str, beginning: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what follows ``beginning`` in ``full``. Raises UnusableRecord when something else begins it."""
    if not full.startswith(beginning):
        at = next((i for i, (a, b) in enumerate(zip(full, beginning, strict=False)) if a != b), len(full))
        before, after = (unmarked(text[at : at + 20]) for text in (beginning, full))
        raise UnusableRecord(
            f"{name_of(tokenizer)}: chat template is not prefix-stable: adding a turn changes the text before it",
            f"from {before!r} to {after!r}: use style='plain' or a template that only appends",
        )
    return full[len(beginning) :]


def source_of(form: Format) -> str:
    """Return the chat template for these tools. Raises InputError when there is none."""
    tokenizer = form.tokenizer
    if not tokenizer.chat_template:
        raise InputError(
            f"{name_of(tokenizer)} has no chat template; use Template(style='plain') or a tokenizer with one"
        )
    try:
        source = tokenizer.get_chat_template(tools=[dict(tool) for tool in form.tools] or None)
    except ValueError as error:
        raise InputError(f"{name_of(tokenizer)}: {' '.join(str(error).split())}") from None
    if not isinstance(source, str):
        raise InputError(f"{name_of(tokenizer)}: chat_template is {type(source).__name__}, not text; correct the file")
    return source


def _quotes(tokenizer: PreTrainedTokenizerBase, template: Template) -> Quotes:
    """What messages only quote, with this template."""
    if template.style != "chat" or not tokenizer.chat_template:
        return quotes_of(tokenizer, plain_texts(template), plain_texts(template))
    sources = tokenizer.chat_template
    literals = "\0".join(
        literals_of(tokenizer, source) for source in (sources.values() if isinstance(sources, dict) else [sources])
    )
    nothing = Format(tokenizer, template, (), quotes_of(tokenizer, "", ""))
    for messages in (_PROBE, _PROBE[:1]):
        try:
            return quotes_of(tokenizer, literals, unmarked(render_chat(messages, nothing, generation=False)))
        except UnusableRecord:
            continue
    return quotes_of(tokenizer, literals, literals)


def variables_of(tokenizer: PreTrainedTokenizerBase, source: Any) -> frozenset[str]:
    """List the variables that a chat template reads. Raises InputError for a damaged one."""
    return frozenset(_asked(tokenizer, source, sandbox.variables_of))


def literals_of(tokenizer: PreTrainedTokenizerBase, source: Any) -> str:
    """Return the texts that a chat template itself holds. Raises InputError for a damaged one."""
    return str(_asked(tokenizer, source, sandbox.literals_of)) if source else ""


def _asked(tokenizer: PreTrainedTokenizerBase, source: Any, ask: Any) -> Any:
    if not isinstance(source, str):
        raise InputError(f"{name_of(tokenizer)}: chat_template is {type(source).__name__}, not text; correct the file")
    try:
        return ask(source)
    except TemplateError as error:
        raise InputError(f"{name_of(tokenizer)}: chat template cannot be read ({error}); correct it") from None


def _as_data(message: Message, form: Format) -> dict[str, Any]:
    """A message as a chat template reads it: every key of the data, without null values, the quotes in it marked."""
    data = {"role": message.role, "content": message.content} | dict(message.keys)
    if reasoning := reasoning_of(message):
        data = {"thinking": reasoning} | data | {"reasoning_content": reasoning}
    present = {key: value for key, value in data.items() if value is not None}
    return dict(marked(present, form, is_response=message.role == "assistant"))


def marked(value: Any, form: Format, *, is_response: bool) -> Any:
    """Mark the quotes in a text or a JSON value, unless ``Template.special_tokens`` wants special tokens of them."""
    return value if form.template.special_tokens == "control" else form.quotes.mark(value, is_response=is_response)


def name_of(tokenizer: PreTrainedTokenizerBase) -> str:
    return f"tokenizer {tokenizer.name_or_path or type(tokenizer).__name__!r}"

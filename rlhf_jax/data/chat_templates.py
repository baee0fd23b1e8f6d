"""Rendering of conversations, and of responses after their prompts, with the tokenizer's chat template."""

from __future__ import annotations

import dataclasses
import os
import re
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import TemplateError

from rlhf_jax.data import sandbox
from rlhf_jax.data.contents import check_rendered, reasoning_of
from rlhf_jax.data.quotes import Quotes, remove_marks
from rlhf_jax.data.row_problems import UnusableRecord
from rlhf_jax.data.special_tokens import quotes_of
from rlhf_jax.data.templates import GIVEN_VARIABLES, Template, parse_date, plain_texts
from rlhf_jax.errors import InputError
from rlhf_jax.records import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_STAND_IN = "A response."
_PROBE = (Message("user", "1"), Message("assistant", "2"), Message("user", "3"))
_QUOTES: weakref.WeakKeyDictionary[Any, dict[tuple[int, str, str], Quotes]] = weakref.WeakKeyDictionary()
"""The cache of `Quotes` for each tokenizer, by (vocabulary size, chat template, template)."""


class Format(NamedTuple):
    """The rendering of messages by a tokenizer with ``template``. tools: JSON schemas of the functions that may be called."""

    tokenizer: PreTrainedTokenizerBase
    template: Template
    tools: Sequence[Mapping[str, Any]]
    quotes: Quotes


def format_of(tokenizer: PreTrainedTokenizerBase, template: Template, tools: Sequence[Mapping[str, Any]]) -> Format:
    """Collect the settings of a rendering. Raises InputError for a damaged chat template."""
    cache = _QUOTES.setdefault(tokenizer, {})
    key = (len(tokenizer), str(tokenizer.chat_template), repr(template))
    if key not in cache:
        cache[key] = _find_quotes(tokenizer, template)
    return Format(tokenizer, template, tools, cache[key])


def render_chat(messages: Sequence[Message], form: Format, *, generation: bool) -> str:
    """Render a conversation with the chat template, its quotes marked.

    generation: end with the header of a response.

    Raises UnusableRecord when the template refuses these messages, InputError when it can render none.
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
        "messages": [_message_data(message, form) for message in messages],
        "tools": mark_quotes(list(form.tools), form, is_response=False) if form.tools else None,
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
    """Render the text after the prompt in a conversation that ends with ``message``. Raises UnusableRecord."""
    try:
        text = _response_after_prompt(messages, message, form)
        # A prompt that ends with "<think>" contains the beginning of a response that begins with "<think>".
        prompt, length = remove_marks(render_chat(messages, form, generation=True)), len(message.content.strip()) or 1
        check_rendered(message, prompt[max(len(prompt) - length + 1, 0) :] + text, "response")
        return text
    except UnusableRecord:
        response = _frame_response(messages, message, form)
        if response is None:
            raise
        return response


def _response_after_prompt(messages: Sequence[Message], message: Message, form: Format) -> str:
    """Render a response after the prompt that a sampler continues. Raises UnusableRecord.

    Some templates put an empty "<think></think>" at the end of a prompt and omit it in a conversation: the response is then
    the text after the header that both share.
    """
    prompt = render_chat(messages, form, generation=True)
    full = render_chat([*messages, message], form, generation=False)
    before = "" if full.startswith(prompt) else render_chat(messages, form, generation=False)
    if before and full.startswith(before) and prompt.startswith(before):
        header, conversation_end = prompt[len(before) :], full[len(before) :]
        content = str(mark_quotes(message.content, form, is_response=True))
        shared = len(os.path.commonprefix([header, conversation_end]))  # noqa: RUF071  (of characters, as meant)
        begin = conversation_end.rfind(content, 0, shared + len(content)) if content.strip() else -1
        if begin >= 0 and header.startswith(conversation_end[:begin]) and _has_closed_tags(header[begin:]):
            return conversation_end[begin:]
    return remainder(full, prompt, form.tokenizer)


def _frame_response(messages: Sequence[Message], message: Message, form: Format) -> str | None:
    """Put the whole text of a response between the texts that the chat template writes before and after a response.

    For templates that write only a part of a response, such as the text after "</think>" for reasoning models: a sampler
    produces the whole response. Returns None when the text would not begin with the prompt that a sampler continues.
    """
    if message.has_calls_or_reasoning or not message.content.strip():
        return None
    stand_in = dataclasses.replace(message, content=_STAND_IN)
    before, prompt = (render_chat(messages, form, generation=generation) for generation in (False, True))
    full = render_chat([*messages, stand_in], form, generation=False)
    head, separator, tail = full[len(before) :].partition(_STAND_IN)
    whole = before + head + str(mark_quotes(message.content, form, is_response=True)) + tail
    if not (separator and full.startswith(before) and prompt.startswith(before + head) and whole.startswith(prompt)):
        return None
    return whole[len(prompt) :]


def _has_closed_tags(text: str) -> bool:
    """Return whether every tag in ``text`` is closed: "<think></think>" is, "<think>" is not."""
    opened, closed = (sorted(re.findall(pattern, text)) for pattern in (r"<(\w+)>", r"</(\w+)>"))
    return opened == closed


def remainder(full: str, beginning: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text after ``beginning`` in ``full``. Raises UnusableRecord when ``full`` begins otherwise."""
    if not full.startswith(beginning):
        at = next((i for i, (a, b) in enumerate(zip(full, beginning, strict=False)) if a != b), len(full))
        before, after = (remove_marks(text[at : at + 20]) for text in (beginning, full))
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


def _find_quotes(tokenizer: PreTrainedTokenizerBase, template: Template) -> Quotes:
    """Find the tokens that messages can only quote with this template."""
    if template.style != "chat" or not tokenizer.chat_template:
        return quotes_of(tokenizer, plain_texts(template), plain_texts(template))
    sources = tokenizer.chat_template
    literals = "\0".join(
        literals_of(tokenizer, source) for source in (sources.values() if isinstance(sources, dict) else [sources])
    )
    unquoted = Format(tokenizer, template, (), quotes_of(tokenizer, "", ""))
    for messages in (_PROBE, _PROBE[:1]):
        try:
            return quotes_of(tokenizer, literals, remove_marks(render_chat(messages, unquoted, generation=False)))
        except UnusableRecord:
            continue
    return quotes_of(tokenizer, literals, literals)


def variables_of(tokenizer: PreTrainedTokenizerBase, source: Any) -> frozenset[str]:
    """List the variables that a chat template reads. Raises InputError for a damaged one."""
    return frozenset(_inspect_source(tokenizer, source, sandbox.variables_of))


def literals_of(tokenizer: PreTrainedTokenizerBase, source: Any) -> str:
    """Return the string literals of a chat template. Raises InputError for a damaged one."""
    return str(_inspect_source(tokenizer, source, sandbox.literals_of)) if source else ""


def _inspect_source(tokenizer: PreTrainedTokenizerBase, source: Any, inspect: Any) -> Any:
    if not isinstance(source, str):
        raise InputError(f"{name_of(tokenizer)}: chat_template is {type(source).__name__}, not text; correct the file")
    try:
        return inspect(source)
    except TemplateError as error:
        raise InputError(f"{name_of(tokenizer)}: chat template cannot be read ({error}); correct it") from None


def _message_data(message: Message, form: Format) -> dict[str, Any]:
    """Return the keys of a message for a chat template, without null values, with quotes marked."""
    data = {"role": message.role, "content": message.content} | dict(message.keys)
    if reasoning := reasoning_of(message):
        data = {"thinking": reasoning} | data | {"reasoning_content": reasoning}
    present = {key: value for key, value in data.items() if value is not None}
    return dict(mark_quotes(present, form, is_response=message.role == "assistant"))


def mark_quotes(value: Any, form: Format, *, is_response: bool) -> Any:
    """Mark the quotes in a text or a JSON value, unless ``Template.special_tokens`` is "control"."""
    return value if form.template.special_tokens == "control" else form.quotes.mark(value, is_response=is_response)


def name_of(tokenizer: PreTrainedTokenizerBase) -> str:
    return f"tokenizer {tokenizer.name_or_path or type(tokenizer).__name__!r}"

"""Rendering of messages as text. In a rendering, special tokens that a message only quotes are marked (``quotes``)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from rlhf_jax.data.chat_templates import (
    Format,
    format_of,
    mark_quotes,
    remainder,
    render_chat,
    render_chat_response,
    source_of,
    variables_of,
)
from rlhf_jax.data.contents import check_rendered, check_tools
from rlhf_jax.data.quotes import Quotes, remove_marks
from rlhf_jax.data.row_problems import UnusableRecord
from rlhf_jax.data.templates import Template
from rlhf_jax.records import SAYING_KEYS, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Turn(NamedTuple):
    """An assistant turn inside a prompt. begin, end: range of the response, in characters of the prompt's text."""

    message: Message
    begin: int
    end: int


def render_prompt(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    tools: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Render the text before a response. Raises InputError when the template cannot render these messages."""
    return remove_marks(prompt_rendering(messages, tokenizer, template, tools))


def render_response(
    messages: Sequence[Message],
    response: str | Message,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    tools: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Render the text of a response after ``render_prompt(messages)``, with the end of turn of the chat template.

    Raises InputError for a template that rewrites earlier turns, or that omits a part of the response.
    """
    return remove_marks(response_rendering(messages, response, tokenizer, template, tools))


def render_conversation(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    template: Template | None = None,
    tools: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Render a whole conversation with the chat template. Raises InputError as `render_prompt` does."""
    return remove_marks(render_chat(messages, format_of(tokenizer, template or Template(), tools), generation=False))


def quotes_for(
    tokenizer: PreTrainedTokenizerBase, template: Template, tools: Sequence[Mapping[str, Any]] = ()
) -> Quotes:
    """Find the tokens that messages can only quote when ``template`` renders them."""
    return format_of(tokenizer, template, tools).quotes


def prompt_rendering(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    tools: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Render a prompt as ``render_prompt`` does, with quotes marked."""
    form = format_of(tokenizer, template, tools)
    if template.style == "chat":
        text = render_chat(messages, form, generation=True)
        check_tools(messages, tools, source_of(form), remove_marks(text))
        return text
    return "".join(text for text, _ in _plain_turns(messages, form))


def response_rendering(
    messages: Sequence[Message],
    response: str | Message,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    tools: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Render a response as ``render_response`` does, with quotes marked.

    Its text is the difference between the renderings with and without it.
    """
    form = format_of(tokenizer, template, tools)
    message = Message("assistant", response) if isinstance(response, str) else response
    if template.style != "chat":
        text = _plain_response(message, form)
        check_rendered(message, text, "response")
        return text
    return render_chat_response(messages, message, form)


def turns_of(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    tools: Sequence[Mapping[str, Any]] = (),
) -> list[Turn]:
    """Find the assistant turns in ``render_prompt(messages)``. Raises InputError when later turns change the text of one."""
    form = format_of(tokenizer, template, tools)
    if template.style != "chat":
        return _plain_spans(messages, form)
    whole = render_chat(messages, form, generation=True)
    turns = []
    for index, message in enumerate(messages):
        if message.role == "assistant":
            before = render_chat(messages[:index], form, generation=True)
            after = render_chat(messages[: index + 1], form, generation=False)
            remainder(after, before, tokenizer)
            remainder(whole, before, tokenizer)
            # The end of a conversation may be absent inside of one: <|endoftext|> after Phi-3's last <|end|>.
            same = os.path.commonprefix([whole, after])  # noqa: RUF071  (of characters, as meant)
            if message.content.strip() not in remove_marks(same[len(before) :]):
                remainder(whole, after, tokenizer)
            turns.append(Turn(message, len(remove_marks(before)), len(remove_marks(same))))
    return turns


def writes_date(tokenizer: PreTrainedTokenizerBase, template: Template) -> bool:
    """Return whether the text of a conversation depends on ``Template.date``. Raises InputError for a damaged chat template."""
    if template.style != "chat" or not tokenizer.chat_template:
        return False
    sources = tokenizer.chat_template
    return any(
        "strftime_now" in variables_of(tokenizer, source)
        for source in (sources.values() if isinstance(sources, dict) else [sources])
    )


def _plain_turns(messages: Sequence[Message], form: Format) -> list[tuple[str, Message | None]]:
    """Render turns with the plain formats; return their texts, each with its message if it is a response.

    Without messages (plain text without a prompt) there are no turns. Raises UnusableRecord.
    """
    template = form.template
    _check_plain(messages, form)
    if template.style == "raw":
        if len(messages) > 1:
            raise UnusableRecord(f"style 'raw' takes one message, not {len(messages)}", "use style 'plain' or 'chat'")
        return [(_plain_content(message, form), None) for message in messages]
    turns = list(messages)
    texts: list[tuple[str, Message | None]] = []
    if turns and turns[0].role == "system":
        texts.append((template.system_format.replace("{system}", _plain_content(turns.pop(0), form)), None))
    roles = [message.role for message in turns]
    # user, assistant, user, ..., user: an odd number of turns that alternate
    if roles != ["user", "assistant"] * (len(roles) // 2) + ["user"] * (len(roles) % 2) or (
        messages and len(roles) % 2 == 0
    ):
        raise UnusableRecord(
            f"style 'plain': turns [{', '.join(roles)}] must alternate from user to user", "merge or use 'chat'"
        )
    for message in turns:
        if message.role == "user":
            texts.append((template.prompt_format.replace("{prompt}", _plain_content(message, form)), None))
        else:
            texts += [(_plain_response(message, form), message), (template.turn_end, None)]
    return texts


def _plain_spans(messages: Sequence[Message], form: Format) -> list[Turn]:
    turns, at = [], 0
    for text, message in _plain_turns(messages, form):
        end = at + len(remove_marks(text))
        if message is not None:
            turns.append(Turn(message, at, end))
        at = end
    return turns


def _plain_response(message: Message, form: Format) -> str:
    _check_plain([message], form)
    prefix = "" if form.template.style == "raw" else form.template.response_prefix
    return ("" if message.content.startswith(prefix) else prefix) + _plain_content(message, form)


def _plain_content(message: Message, form: Format) -> str:
    is_response = message.role == "assistant"
    text = str(mark_quotes(message.content, form, is_response=is_response))
    if form.template.style == "raw" and form.template.special_tokens is None and text != message.content:
        raise UnusableRecord(
            "style 'raw': a text holds a special token",
            "set Template.special_tokens to 'text' (it is quoted there) or 'control' (the text is a rendering)",
        )
    return text


def _check_plain(messages: Sequence[Message], form: Format) -> None:
    """Raise UnusableRecord for messages that only a chat template can render."""
    style, remedy = form.template.style, "use style 'chat', or remove it from the data"
    if form.tools:
        raise UnusableRecord(f"style {style!r} does not write tools", remedy)
    for message in messages:
        if message.role == "tool":
            raise UnusableRecord(f"style {style!r} does not write the message of a tool", remedy)
        for key in SAYING_KEYS:
            if message.keys.get(key):
                raise UnusableRecord(f"style {style!r} does not write {key}", remedy)

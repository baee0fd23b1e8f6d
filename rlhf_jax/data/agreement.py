"""Comparison of the text forms of two models, because a model gives meaningless numbers in a form that it never saw."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from rlhf_jax.data.ends import response_ends
from rlhf_jax.data.plain_chat import begins_with_bos
from rlhf_jax.data.rendering import render_prompt, render_response
from rlhf_jax.data.templates import Template
from rlhf_jax.errors import InputError
from rlhf_jax.records import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_USER, _ANSWER = Message("user", "How many days has a week?"), Message("assistant", "Seven.")
_CONVERSATIONS = ((_USER,), (Message("system", "Answer briefly."), _USER), (_USER, _ANSWER, _USER))


class Form(NamedTuple):
    """The text form of conversations: a template, and the tokenizer whose chat template it may render with."""

    template: Template
    tokenizer: PreTrainedTokenizerBase


def form_difference(learned: Form, current: Form, *, responses: bool) -> str | None:
    """Describe how two forms differ; return None when they render the same text.

    Both render sample conversations with the same date; a conversation that one of them refuses is skipped.

    learned: the form that a model was trained with.
    current: the form that it is used with.
    responses: compare also the text of a response after its prompt, which a reward model reads.
    """
    learned = learned._replace(template=_copy_date(learned.template, current.template))
    fields = _field_differences(learned.template, current.template)
    if not fields and learned.template.style != "chat":
        return None
    if learned == current or (not fields and learned.tokenizer.chat_template == current.tokenizer.chat_template):
        return None
    pairs = [
        pair
        for pair in zip(_sample_texts(learned, responses), _sample_texts(current, responses), strict=True)
        if None not in pair
    ]
    if pairs and all(before == after for before, after in pairs):
        return None
    if fields:
        return fields
    before, after = next((pair for pair in pairs if pair[0] != pair[1]), ("", ""))
    return f"the chat templates differ: it learned {before!r}, here it is {after!r}"


def _copy_date(learned: Template, current: Template) -> Template:
    """Give ``learned`` the date of ``current``: a model may be trained on one day and used on another."""
    return dataclasses.replace(learned, date=current.date) if learned.style == current.style == "chat" else learned


def _field_differences(learned: Template, current: Template) -> str:
    names = [field.name for field in dataclasses.fields(current)]
    values = [(name, getattr(learned, name), getattr(current, name)) for name in names]
    return ", ".join(
        f"Template.{name} was {before!r}, is {after!r}" for name, before, after in values if before != after
    )


def _sample_texts(form: Form, responses: bool) -> list[str | None]:
    """Render the sample conversations, each with BOS and the token that ends a response; None where the form refuses one."""
    template, tokenizer = form

    def text(messages: tuple[Message, ...]) -> str:
        bos = str(tokenizer.bos_token) if begins_with_bos(template, tokenizer) else ""
        prompt = render_prompt(messages, tokenizer, template)
        response = render_response(messages, _ANSWER.content, tokenizer, template) if responses else ""
        return bos + prompt.removeprefix(bos) + response + response_ends(tokenizer, template).text

    return [_render_or_none(text, messages) for messages in _CONVERSATIONS]


def _render_or_none(text: Callable[[tuple[Message, ...]], str], messages: tuple[Message, ...]) -> str | None:
    try:
        return text(messages)
    except InputError:
        return None

"""Do two models write conversations down in the same form? A model in a form that it never saw gives numbers, and nonsense."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from rlhf_jax.data.ends import response_ends
from rlhf_jax.data.plain_chat import begins_with_bos
from rlhf_jax.data.rendering import render_prompt, render_reply
from rlhf_jax.data.templates import Template
from rlhf_jax.errors import InputError
from rlhf_jax.records import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_USER, _ANSWER = Message("user", "How many days has a week?"), Message("assistant", "Seven.")
_CONVERSATIONS = ((_USER,), (Message("system", "Answer briefly."), _USER), (_USER, _ANSWER, _USER))


class Form(NamedTuple):
    """How conversations are written down: a template, and the tokenizer whose chat template it may render with."""

    template: Template
    tokenizer: PreTrainedTokenizerBase


def form_difference(learned: Form, used: Form, *, responses: bool) -> str | None:
    """Say how two forms differ; None when they write the same text.

    Sample conversations are rendered by both, of one date; those that one of them refuses are left out. responses: compare
    also how a response is written after its prompt (a reward model reads it; a policy writes it as it learned).
    """
    learned = learned._replace(template=_of_that_date(learned.template, used.template))
    fields = _other_fields(learned.template, used.template)
    if not fields and learned.template.style != "chat":
        return None
    if learned == used or (not fields and learned.tokenizer.chat_template == used.tokenizer.chat_template):
        return None
    pairs = [
        pair for pair in zip(_written(learned, responses), _written(used, responses), strict=True) if None not in pair
    ]
    if pairs and all(was == now for was, now in pairs):
        return None
    if fields:
        return fields
    was, now = next((pair for pair in pairs if pair[0] != pair[1]), ("", ""))
    return f"the chat templates differ: it learned {was!r}, here it is {now!r}"


def _of_that_date(learned: Template, used: Template) -> Template:
    """``learned`` with the date of ``used``: a model may be trained on one day and used on another."""
    return dataclasses.replace(learned, date=used.date) if learned.style == used.style == "chat" else learned


def _other_fields(learned: Template, used: Template) -> str:
    names = [field.name for field in dataclasses.fields(used)]
    values = [(name, getattr(learned, name), getattr(used, name)) for name in names]
    return ", ".join(f"Template.{name} was {was!r}, is {now!r}" for name, was, now in values if was != now)


def _written(form: Form, responses: bool) -> list[str | None]:
    """The sample conversations as text, each with its BOS and what ends a response; None for one that the form refuses."""
    template, tokenizer = form

    def text(messages: tuple[Message, ...]) -> str:
        bos = str(tokenizer.bos_token) if begins_with_bos(template, tokenizer) else ""
        prompt = render_prompt(messages, tokenizer, template)
        response = render_reply(messages, _ANSWER.content, tokenizer, template) if responses else ""
        return bos + prompt.removeprefix(bos) + response + response_ends(tokenizer, template).text

    return [_or_none(text, messages) for messages in _CONVERSATIONS]


def _or_none(text: Callable[[tuple[Message, ...]], str], messages: tuple[Message, ...]) -> str | None:
    try:
        return text(messages)
    except InputError:
        return None

"""Tokenisation of prompts and responses.

A prompt is always tokenised as one text: for sampling, for a loss on the response and for a loss on every turn. A response
is tokenised separately from its prompt, as a text that continues it (``encode`` gives the reason).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from rlhf_jax.data.contents import check_rendered
from rlhf_jax.data.ends import response_ends
from rlhf_jax.data.quotes import remove_marks
from rlhf_jax.data.rendering import prompt_rendering, quotes_for, response_rendering, turns_of
from rlhf_jax.data.row_problems import UnusableRecord
from rlhf_jax.data.templates import Template
from rlhf_jax.data.tokenise import tokenise, tokenise_with_ends, tokens_within
from rlhf_jax.errors import InputError
from rlhf_jax.records import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LossOn = Literal["response", "assistant", "all"]


class Writing(NamedTuple):
    """The rendering of a record's messages. tools: JSON schemas of the functions that they may call."""

    tokenizer: PreTrainedTokenizerBase
    template: Template
    tools: Sequence[Mapping[str, Any]] = ()


class PromptTokens(NamedTuple):
    """The tokens before a response. mask: True for targets. last: the last token of the text, None without text."""

    ids: list[int]
    mask: list[bool]
    last: int | None


def prompt_tokens(messages: Sequence[Message], writing: Writing, loss_on: LossOn) -> PromptTokens:
    """Tokenise the prompt of a response, with BOS at most once. Raises InputError."""
    tokenizer, template, _ = writing
    messages = _strip_ends(messages, tokenizer, template)
    rendering = prompt_rendering(messages, *writing)
    if loss_on == "all":
        for message in messages:
            check_rendered(message, rendering, f"turn ({message.role})")
    masked = loss_on == "assistant" or (loss_on == "all" and not all(message.learned for message in messages))
    quotes = quotes_for(*writing)
    ids, ends = tokenise_with_ends(rendering, tokenizer, quotes, wants_ends=masked)
    mask = [loss_on == "all"] * len(ids)
    if masked:
        _mark_turns(mask, ids, ends, messages, writing, remove_marks(rendering))
    last = ids[-1] if ids else None
    if _adds_bos(ids, tokenizer, template):
        return PromptTokens([tokenizer.bos_token_id, *ids], [False, *mask], last)
    return PromptTokens(ids, mask, last)


def response_tokens(
    messages: Sequence[Message], response: Message, ended: bool, writing: Writing, after: int | None
) -> list[int] | str:
    """Tokenise a response, or return the reason to skip it. Raises InputError.

    The response ends with the stop token, which occurs once (not at all if the response was cut off). The text that a
    template writes after it is omitted: ChatML writes "Paris.<|im_end|>\\n", a sampler stops at <|im_end|>, and the "\\n"
    belongs to the next prompt.

    after: `PromptTokens.last`.
    """
    tokenizer, template, _ = writing
    end = response_ends(tokenizer, template)
    content = response.content.removesuffix(end.text)
    if not content.strip() and not response.has_calls_or_reasoning:
        return "response is empty"
    if end.text in content:
        return "end token inside the response"
    response = dataclasses.replace(response, content=content)
    rendering = response_rendering(_strip_ends(messages, tokenizer, template), response, *writing)
    ids = tokenise(rendering, tokenizer, quotes_for(*writing), after=after)
    return (ids[: ids.index(end.stop_id)] if end.stop_id in ids else ids) + [end.stop_id] * ended


def _mark_turns(
    mask: list[bool], ids: list[int], ends: list[int], messages: Sequence[Message], writing: Writing, text: str
) -> None:
    """Set ``mask`` to True in learned turns, through the token that ends each, and to False in other turns."""
    stop = response_ends(writing.tokenizer, writing.template).stop_id
    for turn in turns_of(messages, *writing):
        if turn.message.learned:
            check_rendered(turn.message, text[turn.begin : turn.end], "turn (assistant)")
        places = tokens_within(ends, turn.begin, turn.end)
        through = next((number for number, place in enumerate(places, start=1) if ids[place] == stop), len(places))
        for place in places[:through]:
            mask[place] = turn.message.learned


def _strip_ends(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, template: Template
) -> Sequence[Message]:
    """Strip the end token that some data has after assistant messages: the template writes it."""
    if template.style == "raw" or not any(message.role == "assistant" for message in messages):
        return messages
    end = response_ends(tokenizer, template).text
    return [
        dataclasses.replace(message, content=message.content.removesuffix(end))
        if message.role == "assistant" and message.content.endswith(end)
        else message
        for message in messages
    ]


def _adds_bos(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, template: Template) -> bool:
    """Return whether BOS is added before the text of a prompt. Raises InputError."""
    bos = tokenizer.bos_token_id
    if template.bos == "always" and bos is None:
        raise InputError(
            "Template.bos = 'always', but the tokenizer has no beginning-of-sequence token; use bos='auto'"
        )
    if bos is not None and list(ids[:2]) == [bos, bos]:
        raise UnusableRecord(
            "the rendered prompt begins with two beginning-of-sequence tokens", "remove one from the data"
        )
    adds = template.bos == "always" or (template.bos == "auto" and tokenizer("a")["input_ids"][:1] == [bos])
    return adds and list(ids[:1]) != [bos]

"""Settings of the text form of conversations."""

from __future__ import annotations

import datetime
import json
from dataclasses import dataclass, field
from typing import Any, Literal

from rlhf_jax.errors import InputError

STYLES = ("chat", "plain", "raw")
PLAIN_FIELDS = ("prompt_format", "system_format", "response_prefix", "turn_end")
GIVEN_VARIABLES = ("messages", "tools", "documents", "add_generation_prompt", "strftime_now", "raise_exception")


@dataclass(frozen=True)
class Template:
    """The text form of conversations.

    style: "chat" renders with ``tokenizer.chat_template``, "plain" with the formats below, "raw" takes texts unchanged.

    Fields of style "plain" (setting them with another style is an error). With
    prompt_format="\\n\\nHuman: {prompt}\\n\\nAssistant:" and turn_end="" the text is an hh-rlhf dialogue.

    prompt_format: a user turn with the header of the response; "{prompt}" stands for its content.
    system_format: a system message; "{system}" stands for its content.
    response_prefix: the beginning of a response, not doubled when the response has it already (TL;DR responses begin with " ").
    turn_end: the text after a response that is not the last.

    Fields of style "chat":

    arguments: variables of the chat template, such as {"enable_thinking": False}.
    date: the date for chat templates that write one, such as "2026-11-30". None takes the date of the run's first start, or
    of the model's training, and saves it with the model.

    Fields of every style:

    bos: treatment of a rendering without beginning-of-sequence token: "auto" adds one if the tokenizer adds one by default,
    "always" adds one, "never" adds none.
    stop_token: the token that ends a response. None takes the special token that the chat template writes after a response
    ("<end_of_turn>"), or the tokenizer's EOS where it writes none (`data.ends`).
    special_tokens: the encoding of a special token in the text of a message: "text" for tokens of ordinary text, "control"
    for the special token. None is "text"; with style "raw", whose texts may be renderings, such records are unusable.
    """

    style: Literal["chat", "plain", "raw"] = "chat"
    prompt_format: str = "Question: {prompt}\nAnswer:"
    system_format: str = "{system}\n\n"
    response_prefix: str = " "
    turn_end: str = "\n\n"
    bos: Literal["auto", "always", "never"] = "auto"
    stop_token: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict, hash=False)
    date: str | None = None
    special_tokens: Literal["text", "control"] | None = None

    def __post_init__(self) -> None:
        if self.style not in STYLES:
            raise InputError(f"Template.style = {self.style!r}: must be one of {', '.join(STYLES)}")
        if self.bos not in ("auto", "always", "never"):
            raise InputError(f"Template.bos = {self.bos!r}: must be 'auto', 'always' or 'never'")
        if self.special_tokens not in (None, "text", "control"):
            raise InputError(f"Template.special_tokens = {self.special_tokens!r}: must be 'text', 'control' or None")
        for name, place in (("prompt_format", "{prompt}"), ("system_format", "{system}")):
            value = getattr(self, name)
            if not isinstance(value, str) or value.count(place) != 1:
                raise InputError(f"Template.{name} = {value!r}: must hold {place} exactly once")
        for name in PLAIN_FIELDS:
            if not isinstance(getattr(self, name), str):
                raise InputError(f"Template.{name} = {getattr(self, name)!r}: must be text")
            if self.style != "plain" and getattr(self, name) != getattr(type(self), name):
                raise InputError(
                    f"Template.{name} has no effect with style {self.style!r}; unset it or use style='plain'"
                )
        self._check_chat_fields()

    def _check_chat_fields(self) -> None:
        if not isinstance(self.arguments, dict) or not all(isinstance(name, str) for name in self.arguments):
            raise InputError(f"Template.arguments = {self.arguments!r}: must be variables by name, {{'name': value}}")
        for name in GIVEN_VARIABLES:
            if name in self.arguments:
                raise InputError(f"Template.arguments: {name!r} is set for every conversation; leave it out")
        try:
            json.dumps(self.arguments, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(f"Template.arguments = {self.arguments!r}: must be values of JSON ({error})") from None
        if self.date is not None:
            parse_date(self.date)
        for name in ("arguments", "date"):
            if self.style != "chat" and getattr(self, name):
                raise InputError(f"Template.{name} has no effect with style {self.style!r}; unset it")


def parse_date(text: str) -> datetime.date:
    """Parse ``Template.date``. Raises InputError."""
    try:
        return datetime.date.fromisoformat(text)
    except (TypeError, ValueError):
        raise InputError(f"Template.date = {text!r}: must be a date in quotes, '2026-11-30'") from None


def plain_texts(template: Template) -> str:
    return "\0".join(getattr(template, name) for name in PLAIN_FIELDS) if template.style == "plain" else ""

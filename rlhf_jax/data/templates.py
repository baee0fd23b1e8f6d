"""How messages become text: the tokenizer's chat template, a plain format, or the text as it is.

A rendering is a list of pieces, and pieces are tokenised one by one (``encode``): the boundary between prompt and
reply is a boundary between pieces, never found again by searching in tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from jinja2 import TemplateError

from rlhf_jax.data.records import Message
from rlhf_jax.types import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STYLES = ("chat", "plain", "raw")


@dataclass(frozen=True)
class Template:
    """How a conversation is written down. style: "chat" renders with ``tokenizer.chat_template``, "plain" with the
    formats below, "raw" takes texts as they are.

    Fields of style "plain" (setting them with another style is an error):
    prompt_format: a user turn with the header of the reply; "{prompt}" stands for its content.
    system_format: a system message; "{system}" stands for its content.
    response_prefix: what a reply begins with; not doubled when the reply has it already (TL;DR replies begin with " ").
    turn_end: what follows a reply that is not the last.
    With prompt_format="\\n\\nHuman: {prompt}\\n\\nAssistant:" and turn_end="" the text is an hh-rlhf dialogue.

    Fields of every style:
    bos: when the rendering has no beginning-of-sequence token, "auto" puts one first if the tokenizer does so by
    itself,
    "always" puts one first, "never" adds none.
    stop_token: the token that ends a response. None: the special token that the chat template writes after a response
    ("<end_of_turn>"), and the tokenizer's EOS where it writes none (`data.ends`).
    """

    style: Literal["chat", "plain", "raw"] = "chat"
    prompt_format: str = "Question: {prompt}\nAnswer:"
    system_format: str = "{system}\n\n"
    response_prefix: str = " "
    turn_end: str = "\n\n"
    bos: Literal["auto", "always", "never"] = "auto"
    stop_token: str | None = None

    def __post_init__(self) -> None:
        if self.style not in STYLES:
            raise InputError(f"Template.style = {self.style!r}: must be one of {', '.join(STYLES)}")
        if self.bos not in ("auto", "always", "never"):
            raise InputError(f"Template.bos = {self.bos!r}: must be 'auto', 'always' or 'never'")
        for name, place in (("prompt_format", "{prompt}"), ("system_format", "{system}")):
            value = getattr(self, name)
            if not isinstance(value, str) or value.count(place) != 1:
                raise InputError(f"Template.{name} = {value!r}: must hold {place} exactly once")
        for name in ("prompt_format", "system_format", "response_prefix", "turn_end"):
            if not isinstance(getattr(self, name), str):
                raise InputError(f"Template.{name} = {getattr(self, name)!r}: must be text")
            if self.style != "plain" and getattr(self, name) != getattr(type(self), name):
                raise InputError(
                    f"Template.{name} has no effect with style {self.style!r}; unset it or use style='plain'"
                )


@dataclass(frozen=True)
class Piece:
    """A stretch of text tokenised on its own. reply: True when the model should learn to write it."""

    text: str
    reply: bool


def render_prompt(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, template: Template) -> str:
    """The text up to where a reply begins. Raises InputError when the template cannot render these messages."""
    if template.style == "chat":
        return _chat(messages, tokenizer, generation=True)
    return "".join(piece.text for piece in _format_turns(messages, template))


def render_reply(
    messages: Sequence[Message], reply: str, tokenizer: PreTrainedTokenizerBase, template: Template
) -> str:
    """The text of the reply after ``render_prompt(messages)``, with the chat template's own end of turn.

    The conversation is rendered with and without the reply and the reply's text is the difference. Raises InputError
    when the one is not the beginning of the other (the template rewrites earlier turns).
    """
    if template.style == "chat":
        prompt = _chat(messages, tokenizer, generation=True)
        full = _chat([*messages, Message("assistant", reply)], tokenizer, generation=False)
        return _remainder(full, prompt, tokenizer)
    return _plain_reply(reply, template)


def render_conversation(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> str:
    """Render a whole conversation with the chat template, nothing to follow. Raises InputError as `render_prompt` does."""
    return _chat(messages, tokenizer, generation=False)


def render_turns(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, template: Template) -> list[Piece]:
    """``render_prompt`` in pieces, cut around every assistant turn, for a loss on all of them. Raises InputError."""
    if template.style != "chat":
        return _format_turns(messages, template)
    pieces: list[Piece] = []
    done = ""
    for index, message in enumerate(messages):
        if message.role == "assistant":
            before = _chat(messages[:index], tokenizer, generation=True)
            after = _chat(messages[: index + 1], tokenizer, generation=False)
            pieces += [
                Piece(_remainder(before, done, tokenizer), False),
                Piece(_remainder(after, before, tokenizer), True),
            ]
            done = after
    prompt = _chat(messages, tokenizer, generation=True)
    return [*pieces, Piece(_remainder(prompt, done, tokenizer), False)]


def _chat(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, *, generation: bool) -> str:
    if not tokenizer.chat_template:
        raise InputError(
            f"{_name(tokenizer)} has no chat template; use Template(style='plain') or a tokenizer with one"
        )
    conversation = [{"role": message.role, "content": message.content} for message in messages]
    try:
        text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=generation)
    except (TemplateError, ValueError, TypeError, IndexError) as error:
        roles = ", ".join(message.role for message in messages) or "no messages"
        reason = " ".join(str(error).split())
        raise InputError(f"{_name(tokenizer)}: chat template refuses [{roles}] ({reason}); use style='plain'") from None
    assert isinstance(text, str)
    return text


def _remainder(full: str, beginning: str, tokenizer: PreTrainedTokenizerBase) -> str:
    if not full.startswith(beginning):
        at = next((i for i, (a, b) in enumerate(zip(full, beginning, strict=False)) if a != b), len(full))
        raise InputError(
            f"{_name(tokenizer)}: chat template is not prefix-stable: adding a turn changes the text before it, from"
            f" {beginning[at : at + 20]!r} to {full[at : at + 20]!r}; use style='plain' or a template that only appends"
        )
    return full[len(beginning) :]


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return f"tokenizer {tokenizer.name_or_path or type(tokenizer).__name__!r}"


def _format_turns(messages: Sequence[Message], template: Template) -> list[Piece]:
    """Styles "plain" and "raw". No messages give no pieces (plain text to learn from nothing)."""
    if template.style == "raw":
        if len(messages) > 1:
            raise InputError(f"style 'raw' takes one message, not {len(messages)}; use style 'plain' or 'chat'")
        return [Piece(message.content, False) for message in messages]
    pieces: list[Piece] = []
    turns = list(messages)
    if turns and turns[0].role == "system":
        pieces.append(Piece(template.system_format.replace("{system}", turns.pop(0).content), False))
    roles = [message.role for message in turns]
    # user, assistant, user, ..., user: an odd number of turns that alternate
    if roles != ["user", "assistant"] * (len(roles) // 2) + ["user"] * (len(roles) % 2) or (
        messages and len(roles) % 2 == 0
    ):
        raise InputError(
            f"style 'plain': turns [{', '.join(roles)}] must alternate from user to user; merge or use 'chat'"
        )
    for message in turns:
        if message.role == "user":
            pieces.append(Piece(template.prompt_format.replace("{prompt}", message.content), False))
        else:
            pieces += [Piece(_plain_reply(message.content, template), True), Piece(template.turn_end, False)]
    return pieces


def _plain_reply(reply: str, template: Template) -> str:
    if template.style == "raw" or reply.startswith(template.response_prefix):
        return reply
    return template.response_prefix + reply

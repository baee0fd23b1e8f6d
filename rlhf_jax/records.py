"""Records made of users' data (messages, demonstrations, comparisons, prompts), and the responses that rewards score."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rlhf_jax.errors import InputError

ROLES = ("system", "user", "assistant", "tool")
SAYING_KEYS = ("tool_calls", "reasoning_content", "thinking", "reasoning")
"""Keys of a message that carry content besides its text; the last three are alternative names of the reasoning."""


@dataclass(frozen=True)
class Message:
    """A turn of a conversation.

    role: "system", "user", "assistant" or "tool" (the result of a call).
    content: the text.
    keys: the other keys of the message in the data (reasoning_content, tool_calls, tool_call_id, name, ...), for the chat
    template; a "content" of None among them means that the message has calls and no content.
    learned: False for a turn that is excluded from every loss.
    """

    role: str
    content: str
    keys: Mapping[str, Any] = field(default_factory=dict, hash=False)
    learned: bool = True

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise InputError(f"message role {self.role!r}: must be one of {', '.join(ROLES)}")

    @property
    def has_calls_or_reasoning(self) -> bool:
        """Whether the message calls a tool or has reasoning, besides its content."""
        return any(self.keys.get(key) for key in SAYING_KEYS)


@dataclass(frozen=True)
class Demonstration:
    """A prompt with the response to imitate.

    id: unique in its file.
    prompt: the messages before the response; empty for plain text without a prompt.
    response: the text to imitate.
    ended: False for a response that was cut off: no end token is written after it.
    keys, learned: as in `Message`, of the response.
    tools: JSON schemas of the functions that the messages may call.
    """

    id: str
    prompt: tuple[Message, ...]
    response: str
    ended: bool = True
    keys: Mapping[str, Any] = field(default_factory=dict, hash=False)
    learned: bool = True
    tools: tuple[Mapping[str, Any], ...] = field(default=(), hash=False)

    @property
    def messages(self) -> tuple[Message, ...]:
        """The whole conversation: the prompt and the response."""
        return (*self.prompt, Message("assistant", self.response, self.keys, self.learned))


@dataclass(frozen=True)
class Comparison:
    """A preference pair: two responses to a prompt, of which ``chosen`` was preferred.

    margin: the strength of the preference, in units of reward; 0 when it is unknown.
    chosen_ended, rejected_ended: False for a response that was cut off. No end token is written after it: PPO scores
    truncated responses without one, and a reward model that saw an end token there could not learn that stopping matters.
    chosen_keys, rejected_keys: as ``keys`` of `Message`.
    tools: as in `Demonstration`.
    """

    id: str
    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    margin: float = 0.0
    chosen_ended: bool = True
    rejected_ended: bool = True
    chosen_keys: Mapping[str, Any] = field(default_factory=dict, hash=False)
    rejected_keys: Mapping[str, Any] = field(default_factory=dict, hash=False)
    tools: tuple[Mapping[str, Any], ...] = field(default=(), hash=False)

    @property
    def messages(self) -> tuple[Message, ...]:
        """The prompt and both responses."""
        sides = ((self.chosen, self.chosen_keys), (self.rejected, self.rejected_keys))
        return (*self.prompt, *(Message("assistant", text, keys) for text, keys in sides))


@dataclass(frozen=True)
class Prompt:
    """A prompt to sample responses to.

    extra: values for a reward (a reference answer, a list of tests), JSON values by the name of their column.
    tools: as in `Demonstration`.
    """

    id: str
    prompt: tuple[Message, ...]
    extra: Mapping[str, Any] = field(default_factory=dict)
    tools: tuple[Mapping[str, Any], ...] = field(default=(), hash=False)

    @property
    def messages(self) -> tuple[Message, ...]:
        """The messages of the prompt, as `messages` of the other records."""
        return self.prompt


@dataclass(frozen=True)
class Response:
    """A response to a prompt.

    prompt: the messages before the response.
    text: the response without special tokens.
    ended: False when the response was truncated at the length limit.
    extra: the columns of the prompt's row that ``Fields.extra`` names (an answer, a list of tests, ...), JSON values.
    id: the id of the prompt.
    """

    prompt: tuple[Message, ...]
    text: str
    ended: bool = True
    extra: Mapping[str, Any] = field(default_factory=dict)
    id: str = ""


@dataclass(frozen=True)
class Failed:
    """A failed scoring, returned in place of a score: a sandbox did not start, a judge did not answer.

    The response is excluded from means and updates, and counted. A wrong answer is not a failure: give it a score.
    reason: one line, for messages.
    """

    reason: str

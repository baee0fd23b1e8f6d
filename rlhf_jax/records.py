"""What people's data become: messages, demonstrations, comparisons, prompts, and what a reward sees and says of a response."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rlhf_jax.errors import InputError

ROLES = ("system", "user", "assistant", "tool")
SAYING_KEYS = ("tool_calls", "reasoning_content", "thinking", "reasoning")
"""Keys of a message that are part of what it says; the last three are names of one thing."""


@dataclass(frozen=True)
class Message:
    """One turn. role: "system", "user", "assistant" or "tool" (the result of a call).

    keys: what else the data says of it (reasoning_content, tool_calls, tool_call_id, name, ...), for the chat template; a
    "content" of None there says that the message has calls and no content. learned: False for a turn that no loss counts.
    """

    role: str
    content: str
    keys: Mapping[str, Any] = field(default_factory=dict, hash=False)
    learned: bool = True

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise InputError(f"message role {self.role!r}: must be one of {', '.join(ROLES)}")

    @property
    def says_more(self) -> bool:
        """Whether the message says something besides its content: it calls a tool, or reasons."""
        return any(self.keys.get(key) for key in SAYING_KEYS)


@dataclass(frozen=True)
class Demonstration:
    """A prompt with the reply to imitate. An empty ``prompt`` means plain text to continue from nothing.

    ended: False for a reply that was cut off: it gets no end token. keys, learned: as of a `Message`. tools: JSON schemas
    of the functions that the messages may call.
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
        """All of the conversation."""
        return (*self.prompt, Message("assistant", self.response, self.keys, self.learned))


@dataclass(frozen=True)
class Comparison:
    """Two replies to one prompt: ``chosen`` was preferred. margin: by how much, in units of reward (0 = unknown).

    chosen_ended, rejected_ended: False for a reply that was cut off. It gets no end token: PPO scores its cut replies
    without one, and a reward model that saw an end there could not learn that stopping matters. chosen_keys,
    rejected_keys: as of a `Message`. tools: as of a `Demonstration`.
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
    """A prompt to sample replies to. extra: what a reward needs to know of it (a reference answer, a list of
    tests), JSON values by the name of their column."""

    id: str
    prompt: tuple[Message, ...]
    extra: Mapping[str, Any] = field(default_factory=dict)
    tools: tuple[Mapping[str, Any], ...] = field(default=(), hash=False)

    @property
    def messages(self) -> tuple[Message, ...]:
        """Those of the prompt."""
        return self.prompt


@dataclass(frozen=True)
class Response:
    """A response to a prompt.

    prompt: the messages it answers. text: the response without special tokens. ended: False when it was cut at the length
    limit. extra: the columns of the prompt's row that ``Fields.extra`` names (an answer, a list of tests, ...), JSON values.
    id: of the prompt.
    """

    prompt: tuple[Message, ...]
    text: str
    ended: bool = True
    extra: Mapping[str, Any] = field(default_factory=dict)
    id: str = ""


@dataclass(frozen=True)
class Failed:
    """In the place of a score: the machinery failed (a sandbox that did not start, a judge that did not answer), which says
    nothing about the response. It is left out of means and updates, and counted. A wrong answer is no failure: score it.

    reason: for messages, one line.
    """

    reason: str

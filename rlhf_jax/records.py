"""What a reward, a monitor or a judge sees of a sampled response, and what it says when it cannot score one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_jax.data.records import Message


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

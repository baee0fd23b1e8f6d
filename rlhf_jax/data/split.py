"""Splits of records into training and held-out ones with distinct prompts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

from rlhf_jax.data.records import prompt_key
from rlhf_jax.errors import InputError
from rlhf_jax.records import Message


class HasPrompt(Protocol):
    """A record with a prompt: Demonstration, Comparison or Prompt."""

    @property
    def prompt(self) -> tuple[Message, ...]: ...


_RecordT = TypeVar("_RecordT", bound=HasPrompt)


class EmptySide(InputError):
    """A split that leaves no record on one side. side: "training" or "held-out"."""

    def __init__(self, side: str, message: str) -> None:
        super().__init__(message)
        self.side = side


def prompt_fraction(messages: Sequence[Message], salt: str = "") -> float:
    """Return a number in [0, 1) that depends only on the prompt's ``prompt_key`` and the salt: 53 bits of a sha256.

    A float64 holds 53 bits exactly, so that the value never rounds up to 1.0.
    """
    digest = hashlib.sha256(f"{salt}\n{prompt_key(messages)}".encode()).digest()
    return float(int.from_bytes(digest[:8], "big") >> 11) / 2.0**53


def split_key(record: HasPrompt) -> tuple[Message, ...]:
    """Return the messages that decide on which side a record falls: its prompt, or its text when it has no prompt."""
    return record.prompt or (Message("assistant", getattr(record, "response", "")),)


def split_by_prompt(
    records: Iterable[_RecordT], *, held_out: float, salt: str = ""
) -> tuple[list[_RecordT], list[_RecordT]]:
    """Split records into (training, held out), both in the order of ``records``.

    A prompt with ``prompt_fraction < held_out`` is held out.

    A record's side does not depend on other records, so added data moves none, and duplicates (also those that
    differ in case or white space) fall on the same side. held_out: the expected fraction, 0 < held_out < 1.
    Raises InputError when a side is empty.
    """
    if not 0.0 < held_out < 1.0:
        raise InputError(f"held_out = {held_out}: must lie strictly between 0 and 1")
    sides: tuple[list[_RecordT], list[_RecordT]] = ([], [])
    for record in records:
        sides[prompt_fraction(split_key(record), salt) < held_out].append(record)
    if not all(sides):
        side = "held-out" if sides[0] else "training"
        raise EmptySide(
            side, f"held_out = {held_out}: the {side} side is empty; give more distinct prompts or another fraction"
        )
    return sides

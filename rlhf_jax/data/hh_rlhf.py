"""Comparisons of hh-rlhf (Bai et al. 2022; anthropics/hh-rlhf): two dialogues as texts that differ in the last response."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

from rlhf_jax.data.pairs import comparison_of
from rlhf_jax.data.records import Dropped, Fields, Row, Unusable, collect, id_of, text_of
from rlhf_jax.data.row_problems import UnusableRow
from rlhf_jax.records import Comparison, Message

_TURN = re.compile(r"\n\n(Human|Assistant):")


def hh_comparisons(
    rows: Iterable[Row], *, source: str, unusable: Unusable = "drop"
) -> tuple[list[Comparison], Dropped]:
    """Make comparisons from hh-rlhf dialogues and return (records, number of dropped rows by reason).

    ``chosen`` and ``rejected`` are "\\n\\nHuman: ...\\n\\nAssistant: ..." texts with a common beginning. The prompt ends
    with the LAST "\\n\\nAssistant:" of that beginning; the responses follow it. Turns are stripped of outer white space,
    and neighbouring turns of one speaker become one message. Dialogues that differ before the last response are
    unusable. Raises InputError.
    """
    fields = Fields()

    def make(place: str, row: Mapping[str, Any]) -> Comparison:
        chosen, rejected = (text_of(row, fields, key) for key in ("chosen", "rejected"))
        if chosen == rejected:
            raise UnusableRow("chosen equals rejected", "remove the row")
        shared = os.path.commonprefix([chosen, rejected])  # noqa: RUF071  (of characters, as meant)
        boundary = max((match.end() for match in _TURN.finditer(shared) if match[1] == "Assistant"), default=-1)
        if boundary < 0:
            raise UnusableRow(
                "the dialogues share no turn", "both must begin with the same '\\n\\nHuman: ...\\n\\nAssistant:'"
            )
        texts = (chosen[boundary:].strip(), rejected[boundary:].strip())
        if any(_TURN.search(text[boundary:]) for text in (chosen, rejected)):
            raise UnusableRow("the dialogues part before the last response", "keep only the turns both share")
        responses = (Message("assistant", texts[0]), Message("assistant", texts[1]))
        return comparison_of(id_of(row, fields, place), _messages(shared[:boundary]), responses, 0.0)

    return collect(rows, make, source, unusable)


def _messages(text: str) -> tuple[Message, ...]:
    """Return the turns of a dialogue that ends with the header of the next response.

    "\\n\\nHuman: a\\n\\nHuman: b\\n\\nAssistant:" gives one user message "a\\n\\nb".
    """
    head, *parts = _TURN.split(text)  # parts = speaker, content, speaker, content, ..., "Assistant", ""
    turns: list[tuple[str, str]] = []
    for speaker, content in zip(parts[:-2:2], parts[1:-2:2], strict=True):
        role = "user" if speaker == "Human" else "assistant"
        if turns and turns[-1][0] == role:
            turns[-1] = (role, f"{turns[-1][1]}\n\n{content.strip()}".strip())
        else:
            turns.append((role, content.strip()))
    if head.strip():
        raise UnusableRow("text before the first turn", "begin the dialogue with '\\n\\nHuman:'")
    if not turns or turns[-1][0] != "user" or not turns[-1][1]:
        raise UnusableRow("no question before the response", "put a '\\n\\nHuman:' turn before it")
    return tuple(Message(role, content) for role, content in turns)

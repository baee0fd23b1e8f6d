"""Comparisons of hh-rlhf (Bai et al. 2022; anthropics/hh-rlhf): two dialogues as texts, which part at the last reply."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

from rlhf_jax.data.pairs import comparison_of
from rlhf_jax.data.records import Dropped, Fields, Row, Unusable, collect, id_of, text_of
from rlhf_jax.data.row_problems import Unlearnable
from rlhf_jax.records import Comparison, Message

_TURN = re.compile(r"\n\n(Human|Assistant):")


def hh_comparisons(
    rows: Iterable[Row], *, source: str, unusable: Unusable = "drop"
) -> tuple[list[Comparison], Dropped]:
    """(records, number of dropped rows by reason) of hh-rlhf dialogues (Bai et al. 2022; anthropics/hh-rlhf).

    ``chosen`` and ``rejected`` are "\\n\\nHuman: ...\\n\\nAssistant: ..." texts that begin alike. The prompt runs
    through the LAST "\\n\\nAssistant:" of the shared beginning; what follows it are the replies. Turns are stripped
    of outer white space and neighbouring turns of one speaker become one message. Dialogues that part before the last
    reply are unusable.
    """
    fields = Fields()

    def make(place: str, row: Mapping[str, Any]) -> Comparison:
        chosen, rejected = (text_of(row, fields, key) for key in ("chosen", "rejected"))
        if chosen == rejected:
            raise Unlearnable("chosen equals rejected", "remove the row")
        shared = os.path.commonprefix([chosen, rejected])  # noqa: RUF071  (of characters, as meant)
        boundary = max((match.end() for match in _TURN.finditer(shared) if match[1] == "Assistant"), default=-1)
        if boundary < 0:
            raise Unlearnable(
                "the dialogues share no turn", "both must begin with the same '\\n\\nHuman: ...\\n\\nAssistant:'"
            )
        replies = (chosen[boundary:].strip(), rejected[boundary:].strip())
        if any(_TURN.search(text[boundary:]) for text in (chosen, rejected)):
            raise Unlearnable("the dialogues part before the last reply", "keep only the turns both share")
        responses = (Message("assistant", replies[0]), Message("assistant", replies[1]))
        return comparison_of(id_of(row, fields, place), _messages(shared[:boundary]), responses, 0.0)

    return collect(rows, make, source, unusable)


def _messages(text: str) -> tuple[Message, ...]:
    """The turns of a dialogue that ends with the header of the reply to come.

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
        raise Unlearnable("text before the first turn", "begin the dialogue with '\\n\\nHuman:'")
    if not turns or turns[-1][0] != "user" or not turns[-1][1]:
        raise Unlearnable("no question before the reply", "put a '\\n\\nHuman:' turn before it")
    return tuple(Message(role, content) for role, content in turns)

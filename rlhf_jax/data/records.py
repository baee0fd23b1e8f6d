"""What an example says, before any tokenizer: demonstrations, comparisons and prompts made from rows of a file.

A row is ``(line_number, mapping)`` as ``sources.read_rows`` yields it. Nothing here decides where a prompt ends in
tokens: that is ``encode``'s.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, Literal, TypeVar

from rlhf_jax.types import InputError

Row = tuple[int, Mapping[str, Any]]
Scalar = str | float | int
Unusable = Literal["error", "drop"]
"""What to do with a row that is well formed but teaches nothing (empty reply, chosen equal to rejected)."""
ROLES = ("system", "user", "assistant")
_ROLE_NAMES = {role: role for role in ROLES} | {"human": "user", "gpt": "assistant"}
_RecordT = TypeVar("_RecordT")


@dataclass(frozen=True)
class Message:
    """One turn. role: "system", "user" or "assistant"."""

    role: str
    content: str

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise InputError(f"message role {self.role!r}: must be one of {', '.join(ROLES)}")


@dataclass(frozen=True)
class Demonstration:
    """A prompt with the reply to imitate. An empty ``prompt`` means plain text to continue from nothing.

    ended: False for a reply that was cut off: it gets no end token.
    """

    id: str
    prompt: tuple[Message, ...]
    response: str
    ended: bool = True


@dataclass(frozen=True)
class Comparison:
    """Two replies to one prompt: ``chosen`` was preferred. margin: by how much, in units of reward (0 = unknown).

    chosen_ended, rejected_ended: False for a reply that was cut off. It gets no end token: PPO scores its cut replies
    without one, and a reward model that saw an end there could not learn that stopping matters.
    """

    id: str
    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    margin: float = 0.0
    chosen_ended: bool = True
    rejected_ended: bool = True


@dataclass(frozen=True)
class Prompt:
    """A prompt to sample replies to. extra: what a reward needs to know of it (a reference answer, a case number)."""

    id: str
    prompt: tuple[Message, ...]
    extra: Mapping[str, Scalar] = field(default_factory=dict)


@dataclass(frozen=True)
class Fields:
    """Which column is what.

    id: None takes the column "id" where a row has one, else "file name:line".
    prompt: a text (one user message) or a list of messages; None for plain text without a prompt.
    messages: a column with the whole conversation, its last message the reply; ``prompt``, ``response`` are not read.
    ended: column of truth values, read where a row has it: False says that the reply was cut off. In a comparison
    "chosen_" and "rejected_" come before its name.
    margin: None for comparisons without margins.  extra: columns carried along in ``Prompt.extra``.
    role, content: the keys inside a message ("from", "value" in ShareGPT files; roles "human", "gpt" are understood).
    """

    id: str | None = None
    prompt: str | None = "prompt"
    response: str = "response"
    chosen: str = "chosen"
    rejected: str = "rejected"
    messages: str | None = None
    ended: str = "ended"
    margin: str | None = None
    extra: tuple[str, ...] = ()
    role: str = "role"
    content: str = "content"


GSM8K_FIELDS = Fields(prompt="question", response="answer", extra=("answer",))
"""openai/grade-school-math @ grade_school_math/data: the answer's last line is "#### 72"."""


_HH_TURN = re.compile(r"\n\n(Human|Assistant):")


class Unlearnable(Exception):
    """A row is well formed but teaches nothing. args: (reason to count it under, remedy)."""


def demonstrations(
    rows: Iterable[Row], fields: Fields | None = None, *, source: str, unusable: Unusable = "error"
) -> tuple[list[Demonstration], Counter[str]]:
    """(records, number of dropped rows by reason). source: the file's name for messages and ids. Raises InputError."""
    fields = fields or Fields()

    def make(place: str, row: Mapping[str, Any]) -> Demonstration:
        if fields.messages is None:
            prompt, response = _prompt(row, fields, place), _text(row, fields.response, place, fields)
        else:
            *context, last = _messages(_value(row, fields.messages, place), fields.messages, place, fields)
            if last.role != "assistant":
                raise Unlearnable(
                    "last message is not a reply", f"end field {fields.messages!r} with an assistant message"
                )
            prompt, response = tuple(context), last.content
        _require_text(response, fields.response if fields.messages is None else fields.messages)
        return Demonstration(_id(row, fields, place), prompt, response, _flag(row, fields.ended, place))

    return _collect(rows, make, source, unusable)


def comparisons(
    rows: Iterable[Row], fields: Fields | None = None, *, source: str, unusable: Unusable = "error"
) -> tuple[list[Comparison], Counter[str]]:
    """(records, number of dropped rows by reason). Replies are texts, or one message each. Raises InputError."""
    fields = fields or Fields()

    def make(place: str, row: Mapping[str, Any]) -> Comparison:
        prompt = _prompt(row, fields, place)
        chosen, rejected = (_text(row, name, place, fields) for name in (fields.chosen, fields.rejected))
        margin = _margin(row, fields, place)
        ended = [_flag(row, f"{side}_{fields.ended}", place) for side in ("chosen", "rejected")]
        return _comparison(_id(row, fields, place), prompt, (chosen, rejected), margin, *ended)

    return _collect(rows, make, source, unusable)


def prompts(
    rows: Iterable[Row], fields: Fields | None = None, *, source: str, unusable: Unusable = "error"
) -> tuple[list[Prompt], Counter[str]]:
    """(records, number of dropped rows by reason). Raises InputError."""
    fields = fields or Fields()

    def make(place: str, row: Mapping[str, Any]) -> Prompt:
        extra = {name: _scalar(_value(row, name, place), name, place) for name in fields.extra}
        return Prompt(_id(row, fields, place), _prompt(row, fields, place), extra)

    return _collect(rows, make, source, unusable)


def hh_comparisons(
    rows: Iterable[Row], *, source: str, unusable: Unusable = "drop"
) -> tuple[list[Comparison], Counter[str]]:
    """(records, number of dropped rows by reason) of hh-rlhf dialogues (Bai et al. 2022; anthropics/hh-rlhf).

    ``chosen`` and ``rejected`` are "\\n\\nHuman: ...\\n\\nAssistant: ..." texts that begin alike. The prompt runs
    through the LAST "\\n\\nAssistant:" of the shared beginning; what follows it are the replies. Turns are stripped
    of outer white space and neighbouring turns of one speaker become one message. Dialogues that part before the last
    reply are unusable.
    """
    fields = Fields()

    def make(place: str, row: Mapping[str, Any]) -> Comparison:
        chosen, rejected = (_text(row, name, place, fields) for name in (fields.chosen, fields.rejected))
        if chosen == rejected:
            raise Unlearnable("chosen equals rejected", "remove the row")
        shared = os.path.commonprefix([chosen, rejected])  # noqa: RUF071  (of characters, as meant)
        boundary = max((match.end() for match in _HH_TURN.finditer(shared) if match[1] == "Assistant"), default=-1)
        if boundary < 0:
            raise Unlearnable(
                "the dialogues share no turn", "both must begin with the same '\\n\\nHuman: ...\\n\\nAssistant:'"
            )
        replies = (chosen[boundary:].strip(), rejected[boundary:].strip())
        if any(_HH_TURN.search(text[boundary:]) for text in (chosen, rejected)):
            raise Unlearnable("the dialogues part before the last reply", "keep only the turns both share")
        return _comparison(_id(row, fields, place), _hh_messages(shared[:boundary]), replies, 0.0)

    return _collect(rows, make, source, unusable)


def _hh_messages(text: str) -> tuple[Message, ...]:
    """The turns of a dialogue that ends with the header of the reply to come.

    "\\n\\nHuman: a\\n\\nHuman: b\\n\\nAssistant:" gives one user message "a\\n\\nb".
    """
    head, *parts = _HH_TURN.split(text)  # parts = speaker, content, speaker, content, ..., "Assistant", ""
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


def prompts_of(records: Iterable[Demonstration | Comparison]) -> list[Prompt]:
    """The distinct prompts of ``records`` in order of first appearance (equal by ``prompt_key``), with the first id."""
    first: dict[str, Prompt] = {}
    for record in records:
        first.setdefault(prompt_key(record.prompt), Prompt(record.id, record.prompt))
    return list(first.values())


def prompt_key(messages: Sequence[Message]) -> str:
    """A text equal for prompts that differ in white space or case only: "Hi  there" and "hi there" are one prompt."""
    return "\n".join(f"{message.role}: {' '.join(message.content.split()).casefold()}" for message in messages)


def _collect(
    rows: Iterable[Row], make: Callable[[str, Mapping[str, Any]], _RecordT], source: str, unusable: Unusable
) -> tuple[list[_RecordT], Counter[str]]:
    if unusable not in ("error", "drop"):
        raise InputError(f"unusable = {unusable!r}: must be 'error' or 'drop'")
    records: list[_RecordT] = []
    dropped: Counter[str] = Counter()
    line_of: dict[str, int] = {}
    for line, row in rows:
        place = f"{source}:{line}"
        try:
            record = make(place, row)
        except Unlearnable as problem:
            reason, remedy = problem.args
            if unusable == "error":
                raise InputError(f"{place}: {reason}; {remedy}, or drop such rows with unusable='drop'") from None
            dropped[reason] += 1
            continue
        identity: str = record.id  # type: ignore[attr-defined]
        if identity in line_of:
            raise InputError(f"{place}: id {identity!r} is also that of line {line_of[identity]}; make ids unique")
        line_of[identity] = line
        records.append(record)
    return records, dropped


def _comparison(
    identity: str, prompt: tuple[Message, ...], replies: tuple[str, str], margin: float, *ended: bool
) -> Comparison:
    chosen, rejected = replies
    _require_text(chosen, "chosen")
    _require_text(rejected, "rejected")
    if chosen == rejected:
        raise Unlearnable("chosen equals rejected", "remove the row")
    return Comparison(identity, prompt, chosen, rejected, margin, *ended)


def _require_text(text: str, name: str) -> None:
    if not text.strip():
        raise Unlearnable(f"field {name!r} is empty", "fill it in or remove the row")


def _value(row: Mapping[str, Any], name: str, place: str) -> Any:
    if name not in row or row[name] is None:
        present = ", ".join(repr(key) for key in row)
        raise InputError(
            f"{place}: field {name!r} is missing; the row has {present or 'no fields'}: set Fields accordingly"
        )
    return row[name]


def _text(row: Mapping[str, Any], name: str, place: str, fields: Fields) -> str:
    """A text, or the content of a single message (a mapping, or a list with one)."""
    value = _value(row, name, place)
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        value = [value]
    if isinstance(value, Sequence) and len(value) == 1:
        return _messages(value, name, place, fields)[0].content
    raise InputError(
        f"{place}: field {name!r} is {type(value).__name__}, not text or one message; convert it to a string"
    )


def _prompt(row: Mapping[str, Any], fields: Fields, place: str) -> tuple[Message, ...]:
    if fields.prompt is None:
        return ()
    value = _value(row, fields.prompt, place)
    if isinstance(value, str):
        _require_text(value, fields.prompt)
        return (Message("user", value),)
    messages = _messages(value, fields.prompt, place, fields)
    if messages[-1].role != "user":
        raise Unlearnable(
            "last message of the prompt is not the user's", f"end field {fields.prompt!r} with a user message"
        )
    _require_text(messages[-1].content, fields.prompt)
    return messages


def _messages(value: Any, name: str, place: str, fields: Fields) -> tuple[Message, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise InputError(f"{place}: field {name!r} is {type(value).__name__}, not text or messages; convert it")
    if not value:
        raise Unlearnable(f"field {name!r} is empty", "fill it in or remove the row")
    messages = []
    for number, item in enumerate(value, start=1):
        at = f"{place}: field {name!r}, message {number}"
        if not isinstance(item, Mapping) or fields.role not in item or fields.content not in item:
            raise InputError(
                f"{at}: must be an object with {fields.role!r} and {fields.content!r}; set Fields.role and content"
            )
        role, content = item[fields.role], item[fields.content]
        if role not in _ROLE_NAMES:
            raise InputError(f"{at}: role {role!r} is unknown; use {', '.join(_ROLE_NAMES)}")
        if not isinstance(content, str):
            raise InputError(f"{at}: content is {type(content).__name__}, not text; convert it to a string")
        messages.append(Message(_ROLE_NAMES[role], content))
    return tuple(messages)


def _id(row: Mapping[str, Any], fields: Fields, place: str) -> str:
    if fields.id is not None:
        return str(_scalar(_value(row, fields.id, place), fields.id, place))
    if row.get("id") is not None:
        return str(_scalar(row["id"], "id", place))
    return PurePath(place).name


def _flag(row: Mapping[str, Any], name: str, place: str) -> bool:
    """A truth value; True where the row has none."""
    value = row.get(name)
    if value is None:
        return True
    if not isinstance(value, bool):
        raise InputError(
            f"{place}: field {name!r} is {type(value).__name__}, not true or false; name another Fields.ended"
        )
    return value


def _scalar(value: Any, name: str, place: str) -> Scalar:
    if isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return value
    raise InputError(f"{place}: field {name!r} is {type(value).__name__}, not text or a number; convert it")


def _margin(row: Mapping[str, Any], fields: Fields, place: str) -> float:
    if fields.margin is None:
        return 0.0
    value = _scalar(_value(row, fields.margin, place), fields.margin, place)
    try:
        margin = float(value)
    except ValueError:
        margin = math.nan
    if not math.isfinite(margin):
        raise InputError(
            f"{place}: field {fields.margin!r} is {value!r}, not a finite number; give a number or unset Fields.margin"
        )
    return margin

"""What an example says, before any tokenizer: demonstrations, comparisons and prompts made from rows of a file.

A row is ``(line_number, mapping)`` as ``sources.read_rows`` yields it. Nothing here decides where a prompt ends in
tokens: that is ``encode``'s.
"""

from __future__ import annotations

import math
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
ROLES = ("system", "user", "assistant", "tool")
SAYING_KEYS = ("tool_calls", "reasoning_content", "thinking", "reasoning")
"""Keys of a message that are part of what it says; the last three are names of one thing."""
_ROLE_NAMES = {role: role for role in ROLES} | {"human": "user", "gpt": "assistant"}
_RecordT = TypeVar("_RecordT")


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


@dataclass(frozen=True)
class Prompt:
    """A prompt to sample replies to. extra: what a reward needs to know of it (a reference answer, a case number)."""

    id: str
    prompt: tuple[Message, ...]
    extra: Mapping[str, Scalar] = field(default_factory=dict)
    tools: tuple[Mapping[str, Any], ...] = field(default=(), hash=False)


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


class Unlearnable(Exception):
    """A row is well formed but teaches nothing. args: (reason to count it under, remedy)."""


def demonstrations(
    rows: Iterable[Row], fields: Fields | None = None, *, source: str, unusable: Unusable = "error"
) -> tuple[list[Demonstration], Counter[str]]:
    """(records, number of dropped rows by reason). source: the file's name for messages and ids. Raises InputError."""
    fields = fields or Fields()

    def make(place: str, row: Mapping[str, Any]) -> Demonstration:
        if fields.messages is None:
            prompt, response = _prompt(row, fields, place), text_of(row, fields.response, place, fields)
        else:
            *context, last = _messages(_value(row, fields.messages, place), fields.messages, place, fields)
            if last.role != "assistant":
                raise Unlearnable(
                    "last message is not a reply", f"end field {fields.messages!r} with an assistant message"
                )
            prompt, response = tuple(context), last.content
        _require_text(response, fields.response if fields.messages is None else fields.messages)
        return Demonstration(id_of(row, fields, place), prompt, response, _flag(row, fields.ended, place))

    return collect(rows, make, source, unusable)


def comparisons(
    rows: Iterable[Row], fields: Fields | None = None, *, source: str, unusable: Unusable = "error"
) -> tuple[list[Comparison], Counter[str]]:
    """(records, number of dropped rows by reason). Replies are texts, or one message each. Raises InputError."""
    fields = fields or Fields()

    def make(place: str, row: Mapping[str, Any]) -> Comparison:
        prompt = _prompt(row, fields, place)
        chosen, rejected = (text_of(row, name, place, fields) for name in (fields.chosen, fields.rejected))
        margin = _margin(row, fields, place)
        ended = [_flag(row, f"{side}_{fields.ended}", place) for side in ("chosen", "rejected")]
        return comparison_of(id_of(row, fields, place), prompt, (chosen, rejected), margin, *ended)

    return collect(rows, make, source, unusable)


def prompts(
    rows: Iterable[Row], fields: Fields | None = None, *, source: str, unusable: Unusable = "error"
) -> tuple[list[Prompt], Counter[str]]:
    """(records, number of dropped rows by reason). Raises InputError."""
    fields = fields or Fields()

    def make(place: str, row: Mapping[str, Any]) -> Prompt:
        extra = {name: _scalar(_value(row, name, place), name, place) for name in fields.extra}
        return Prompt(id_of(row, fields, place), _prompt(row, fields, place), extra)

    return collect(rows, make, source, unusable)


def prompts_of(records: Iterable[Demonstration | Comparison]) -> list[Prompt]:
    """The distinct prompts of ``records`` in order of first appearance (equal by ``prompt_key``), with the first id."""
    first: dict[str, Prompt] = {}
    for record in records:
        first.setdefault(prompt_key(record.prompt), Prompt(record.id, record.prompt))
    return list(first.values())


def prompt_key(messages: Sequence[Message]) -> str:
    """A text equal for prompts that differ in white space or case only: "Hi  there" and "hi there" are one prompt."""
    return "\n".join(f"{message.role}: {' '.join(message.content.split()).casefold()}" for message in messages)


def collect(
    rows: Iterable[Row], make: Callable[[str, Mapping[str, Any]], _RecordT], source: str, unusable: Unusable
) -> tuple[list[_RecordT], Counter[str]]:
    """What ``make(place, row)`` makes of each row, and how many it could not (`Unlearnable`), by reason. Raises InputError."""
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


def comparison_of(
    identity: str, prompt: tuple[Message, ...], replies: tuple[str, str], margin: float, *ended: bool
) -> Comparison:
    """replies: (chosen, rejected). ended: of each. Raises Unlearnable when there is nothing to tell them apart by."""
    chosen, rejected = replies
    _require_text(chosen, "chosen")
    _require_text(rejected, "rejected")
    if chosen == rejected:
        raise Unlearnable("chosen equals rejected", "remove the row")
    chosen_ended, rejected_ended = ended or (True, True)
    return Comparison(identity, prompt, chosen, rejected, margin, chosen_ended, rejected_ended)


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


def text_of(row: Mapping[str, Any], name: str, place: str, fields: Fields) -> str:
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


def id_of(row: Mapping[str, Any], fields: Fields, place: str) -> str:
    """Of ``fields.id``, the column "id", or else "file name:line"."""
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

"""Conversion of a file's rows to demonstrations and prompts, before tokenisation.

A row is ``(line_number, mapping)`` as ``sources.read_rows`` yields it. `pairs` makes the comparisons. `encode` decides
where a prompt ends in tokens.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Literal, Protocol, TypeVar

from rlhf_jax.data.message_keys import content_of, keys_of, learned_of, tools_of
from rlhf_jax.data.row_problems import FaultyObject, UnusableRow, check_value
from rlhf_jax.errors import InputError
from rlhf_jax.records import ROLES, SAYING_KEYS, Comparison, Demonstration, Message, Prompt

Row = tuple[int, Mapping[str, Any]]
Scalar = str | float | int
Unusable = Literal["error", "drop"]
"""The treatment of a row that gives no record (an empty or null response, a missing field, chosen equal to rejected)."""
_ROLE_NAMES = {role: role for role in ROLES} | {"human": "user", "gpt": "assistant"}


class HasId(Protocol):
    """A record with an id: Demonstration, Comparison or Prompt."""

    @property
    def id(self) -> str: ...


_RecordT = TypeVar("_RecordT", bound=HasId)


@dataclass(frozen=True)
class Fields:
    """Names of the columns that records are read from.

    id: column of ids; None takes the column "id" where a row has one, else "file name:line".
    prompt: column of prompts, each a text (one user message) or a list of messages; None for plain text without a prompt.
    response: column of a demonstration's response, a text or one message.
    chosen: column of a comparison's preferred response, a text, one message or a whole conversation.
    rejected: column of a comparison's other response, as chosen.
    messages: column of whole conversations that end with the response, read in place of prompt and response; None
    reads those two columns.
    ended: column of truth values, read where a row has it; False means that the response was cut off. Comparisons have two
    columns, with "chosen_" and "rejected_" before this name.
    margin: column of the preference's strength in units of reward; None for comparisons without margins.
    extra: columns that are copied to ``Prompt.extra``, for rewards.
    role: key of a message's role ("from" in ShareGPT files, whose roles "human" and "gpt" are understood).
    content: key of a message's text ("value" in ShareGPT files).
    tools: column of the functions that may be called (JSON schemas), read where a row has it; None ignores it.
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
    tools: str | None = "tools"


GSM8K_FIELDS = Fields(prompt="question", response="answer", extra=("answer",))
"""Columns of GSM8K (openai/grade-school-math @ grade_school_math/data); the last line of an answer is "#### 72"."""


class Dropped(Counter[str]):
    """The number of dropped rows by reason.

    first: the message about the first dropped row, with its place and the remedy.
    """

    first: str = ""


def demonstrations(
    rows: Iterable[Row], fields: Fields | None = None, *, source: str, unusable: Unusable = "error"
) -> tuple[list[Demonstration], Dropped]:
    """Make demonstrations from rows and return (records, number of dropped rows by reason).

    source: the file's name, for messages and ids. Raises InputError for an unusable row, unless ``unusable`` is "drop".
    """
    fields = fields or Fields()

    def make(place: str, row: Mapping[str, Any]) -> Demonstration:
        if fields.messages is None:
            prompt, last = prompt_of(row, fields), response_of(row, fields, "response")
        else:
            *context, last = messages_of(value_of(row, fields.messages, "messages"), fields.messages, fields)
            if last.role != "assistant":
                raise UnusableRow(
                    "last message is not a response", f"end field {fields.messages!r} with an assistant message"
                )
            prompt = tuple(context)
        require_content(last, fields.response if fields.messages is None else fields.messages)
        ended, tools = flag_of(row, fields.ended), tools_of(row, fields.tools)
        return Demonstration(id_of(row, fields, place), prompt, last.content, ended, last.keys, last.learned, tools)

    return collect(rows, make, source, unusable)


def prompts(
    rows: Iterable[Row], fields: Fields | None = None, *, source: str, unusable: Unusable = "error"
) -> tuple[list[Prompt], Dropped]:
    """Make prompts from rows, as `demonstrations` does. Raises InputError."""
    fields = fields or Fields()

    def make(place: str, row: Mapping[str, Any]) -> Prompt:
        extra = {name: extra_of(row, name) for name in fields.extra}
        return Prompt(id_of(row, fields, place), prompt_of(row, fields), extra, tools_of(row, fields.tools))

    return collect(rows, make, source, unusable)


def prompts_of(records: Iterable[Demonstration | Comparison]) -> list[Prompt]:
    """Return the distinct prompts of ``records`` (by ``prompt_key``) in order of first appearance, each with its first id."""
    first: dict[str, Prompt] = {}
    for record in records:
        first.setdefault(prompt_key(record.prompt), Prompt(record.id, record.prompt, tools=record.tools))
    return list(first.values())


def prompt_key(messages: Sequence[Message]) -> str:
    """Return a text that is equal for prompts that differ only in white space or case, such as "Hi  there" and "hi there"."""
    return "\n".join(
        f"{message.role}: {' '.join(message.content.split()).casefold()}"
        + "".join(f" {key}: {json.dumps(message.keys[key])}" for key in SAYING_KEYS if message.keys.get(key))
        for message in messages
    )


def collect(
    rows: Iterable[Row], make: Callable[[str, Mapping[str, Any]], _RecordT], source: str, unusable: Unusable
) -> tuple[list[_RecordT], Dropped]:
    """Call ``make(place, row)`` for each row; return the records and the number of unusable rows (`UnusableRow`) by reason.

    Raises InputError for a repeated id, and for an unusable row when ``unusable`` is "error".
    """
    if unusable not in ("error", "drop"):
        raise InputError(f"unusable = {unusable!r}: must be 'error' or 'drop'")
    records: list[_RecordT] = []
    dropped = Dropped()
    line_of: dict[str, int] = {}
    for line, row in rows:
        place = f"{source}:{line}"
        try:
            if isinstance(row, FaultyObject):
                raise row.problem
            record = make(place, row)
        except UnusableRow as problem:
            reason, remedy, *detail = problem.args
            message = f"{place}: {reason}{''.join(detail)}; {remedy}"
            if unusable == "error":
                raise InputError(f"{message}, or drop such rows with unusable='drop'") from None
            dropped[reason] += 1
            dropped.first = dropped.first or message
            continue
        if record.id in line_of:
            raise InputError(
                f"{place}: id {record.id!r} is also that of line {line_of[record.id]}; make ids unique, or name another "
                "column with Fields.id"
            )
        line_of[record.id] = line
        records.append(record)
    return records, dropped


def require_text(text: str, name: str) -> None:
    """Raise UnusableRow when ``text`` is empty or white space."""
    if not text.strip():
        raise UnusableRow(f"field {name!r} is empty", "fill it in or remove the row")


def require_content(message: Message, name: str) -> None:
    """Raise UnusableRow for a response without text, call and reasoning."""
    if not message.has_calls_or_reasoning:
        require_text(message.content, name)


def value_of(row: Mapping[str, Any], name: str, key: str) -> Any:
    """Return the value of a column. key: the field of `Fields` that names it. Raises UnusableRow when it is missing or null."""
    if name not in row:
        present = ", ".join(repr(column) for column in row)
        raise UnusableRow(
            f"field {name!r} is missing", f"the row has {present or 'no fields'}: set Fields.{key} accordingly"
        )
    value = row[name]
    if value is None:
        raise UnusableRow(f"field {name!r} is null", "fill it in or remove the row")
    check_value(value, name)
    return value


def text_of(row: Mapping[str, Any], fields: Fields, key: str) -> str:
    """Return the content of ``response_of``."""
    return response_of(row, fields, key).content


def response_of(row: Mapping[str, Any], fields: Fields, key: str) -> Message:
    """Return the response in a column: a text, or a single message (a mapping, or a list with one).

    key: the field of `Fields` that names the column. Raises UnusableRow.
    """
    name = getattr(fields, key)
    value = value_of(row, name, key)
    if isinstance(value, str):
        return Message("assistant", value)
    if isinstance(value, Mapping):
        value = [value]
    if isinstance(value, Sequence) and len(value) < 2:
        message = messages_of(value, name, fields)[0]
        if message.role != "assistant":
            raise UnusableRow(f"field {name!r} is a turn of the {message.role}, no response", "name another column")
        return message
    if isinstance(value, bool | int | float):
        raise _not_text(name, value, "text or one message")
    conversation = isinstance(value, Sequence) and bool(value) and key == "response"
    remedy = (
        f"set Fields.messages = {name!r} for whole conversations" if conversation else "write a text or one message"
    )
    raise UnusableRow(f"field {name!r} is {type(value).__name__}, not text or one message", remedy)


def _not_text(name: str, value: Any, expected: str) -> UnusableRow:
    return UnusableRow(
        f"field {name!r} is {type(value).__name__}, not {expected}", "write it in quotes, as text", f" ({value!r})"
    )


def prompt_of(row: Mapping[str, Any], fields: Fields) -> tuple[Message, ...]:
    """Return the messages before the response; () when ``Fields.prompt`` is None. Raises UnusableRow."""
    if fields.prompt is None:
        return ()
    value = value_of(row, fields.prompt, "prompt")
    if isinstance(value, str):
        require_text(value, fields.prompt)
        return (Message("user", value),)
    messages = messages_of(value, fields.prompt, fields)
    require_question(messages, fields.prompt)
    return messages


def require_question(messages: Sequence[Message], name: str) -> None:
    """Raise UnusableRow unless the messages of a prompt end with a user's message or a tool's result."""
    if not messages or messages[-1].role not in ("user", "tool"):
        raise UnusableRow("last message of the prompt is not the user's", f"end field {name!r} with a user message")
    require_text(messages[-1].content, name)


def messages_of(value: Any, name: str, fields: Fields) -> tuple[Message, ...]:
    """Return the messages of a column, at least one. Raises UnusableRow."""
    if isinstance(value, bool | int | float):
        raise _not_text(name, value, "text or messages")
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise UnusableRow(f"field {name!r} is {type(value).__name__}, not text or messages", "write a list of messages")
    if not value:
        raise UnusableRow(f"field {name!r} is empty", "fill it in or remove the row")
    messages = []
    for number, item in enumerate(value, start=1):
        at = f"field {name!r}, message {number}"
        calls = isinstance(item, Mapping) and any(item.get(key) for key in SAYING_KEYS)
        if not isinstance(item, Mapping) or fields.role not in item or not (fields.content in item or calls):
            raise UnusableRow(
                f"{at}: must be an object with {fields.role!r} and {fields.content!r}",
                "set Fields.role and Fields.content",
            )
        name_of_role = item[fields.role]
        if not isinstance(name_of_role, str) or name_of_role not in _ROLE_NAMES:
            raise UnusableRow(f"{at}: role {name_of_role!r} is unknown", f"use {', '.join(_ROLE_NAMES)}")
        role = _ROLE_NAMES[name_of_role]
        keys = keys_of(item, fields.role, fields.content, at)
        messages.append(Message(role, content_of(item, fields.content, at), keys, learned_of(item, role, at)))
    return tuple(messages)


def id_of(row: Mapping[str, Any], fields: Fields, place: str) -> str:
    """Return the id of a row: from the column ``fields.id``, else from the column "id", else "file name:line"."""
    if fields.id is not None:
        return str(scalar_of(value_of(row, fields.id, "id"), fields.id))
    if row.get("id") is not None:
        return str(scalar_of(value_of(row, "id", "id"), "id"))
    return PurePath(place).name


def flag_of(row: Mapping[str, Any], name: str) -> bool:
    """Return the truth value of a column (text in csv files); True where the row has none. Raises UnusableRow."""
    value = row.get(name)
    if value is None:
        return True
    if isinstance(value, str):
        value = {"true": True, "false": False}.get(value.lower(), value)
    if not isinstance(value, bool):
        raise UnusableRow(f"field {name!r} is {type(value).__name__}, not true or false", "name another Fields.ended")
    return value


def scalar_of(value: Any, name: str) -> Scalar:
    """Check that ``value`` is a text or a finite number and return it. Raises UnusableRow."""
    if isinstance(value, (str, int, float)) and not isinstance(value, bool):
        if isinstance(value, float) and not math.isfinite(value):
            raise UnusableRow(f"field {name!r} is {value!r}, not a finite number", "give a number or remove the row")
        return value
    raise UnusableRow(f"field {name!r} is {type(value).__name__}, not text or a number", "write it as text")


def extra_of(row: Mapping[str, Any], name: str) -> Any:
    """Return a column for a reward, any JSON value or null. Raises UnusableRow when it is missing or not a JSON value."""
    if row.get(name, "") is None:
        return None
    try:
        return _json_value(value_of(row, name, "extra"), name)
    except RecursionError:
        raise UnusableRow(f"field {name!r} is nested too deeply", "flatten it") from None


def _json_value(value: Any, name: str) -> Any:
    """Convert ``value`` to lists, dicts, texts, numbers, truth values and None. Raises UnusableRow."""
    if hasattr(value, "tolist"):  # numpy, from parquet
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _json_value(item, name) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(item, name) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise UnusableRow(
            f"field {name!r} is {value!r}, not a finite number", "give a number, or null, or remove the row"
        )
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise UnusableRow(f"field {name!r} holds {type(value).__name__}, which is no JSON value", "write it as text")

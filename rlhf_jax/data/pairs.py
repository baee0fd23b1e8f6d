"""Comparisons made from rows: a prompt with a chosen and a rejected response, as texts or as whole conversations."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from rlhf_jax.data.message_keys import tools_of
from rlhf_jax.data.records import (
    Dropped,
    Fields,
    Row,
    Unusable,
    collect,
    flag_of,
    id_of,
    messages_of,
    prompt_of,
    require_content,
    require_question,
    response_of,
    scalar_of,
    value_of,
)
from rlhf_jax.data.row_problems import UnusableRow
from rlhf_jax.errors import LARGEST_NUMBER
from rlhf_jax.records import Comparison, Message


def comparisons(
    rows: Iterable[Row], fields: Fields | None = None, *, source: str, unusable: Unusable = "error"
) -> tuple[list[Comparison], Dropped]:
    """Make comparisons from rows and return (records, number of dropped rows by reason).

    Responses are texts, one message each, or whole conversations that differ only in their last message: the shared turns
    are then the prompt, and a prompt column, where a row has one, must agree. Raises InputError.
    """
    fields = fields or Fields()

    def make(place: str, row: Mapping[str, Any]) -> Comparison:
        sides = _read_sides(row, fields)
        margin = _read_margin(row, fields)
        ended = [flag_of(row, f"{side}_{fields.ended}") for side in ("chosen", "rejected")]
        responses = (sides.chosen, sides.rejected)
        record = comparison_of(id_of(row, fields, place), sides.prompt, responses, margin, *ended)
        return dataclasses.replace(record, tools=tools_of(row, fields.tools))

    return collect(rows, make, source, unusable)


def comparison_of(
    identity: str, prompt: tuple[Message, ...], responses: tuple[Message, Message], margin: float, *ended: bool
) -> Comparison:
    """Make a comparison. Raises UnusableRow for equal or empty responses.

    responses: (chosen, rejected).
    ended: whether each response ended, in the same order; both by default.
    """
    for name, response in zip(("chosen", "rejected"), responses, strict=True):
        require_content(response, name)
        if not response.learned:
            raise UnusableRow(f"field {name!r} has weight 0", "remove the row")
    chosen, rejected = responses
    if chosen == rejected:
        raise UnusableRow("chosen equals rejected", "remove the row")
    chosen_ended, rejected_ended = ended or (True, True)
    texts, keys = (chosen.content, rejected.content), (chosen.keys, rejected.keys)
    return Comparison(identity, prompt, *texts, margin, chosen_ended, rejected_ended, *keys)


class _Sides(NamedTuple):
    prompt: tuple[Message, ...]
    chosen: Message
    rejected: Message


def _read_sides(row: Mapping[str, Any], fields: Fields) -> _Sides:
    columns = {key: value_of(row, getattr(fields, key), key) for key in ("chosen", "rejected")}
    conversations = [_is_conversation(value) for value in columns.values()]
    if not any(conversations):
        return _Sides(prompt_of(row, fields), *[response_of(row, fields, key) for key in columns])
    if not all(conversations):
        raise UnusableRow("one of chosen and rejected is a conversation, the other is not", "write both alike")
    chosen, rejected = (messages_of(value, getattr(fields, key), fields) for key, value in columns.items())
    if chosen == rejected:
        raise UnusableRow("chosen equals rejected", "remove the row")
    if chosen[:-1] != rejected[:-1]:
        raise UnusableRow("the conversations part before their last message", "keep only the turns both share")
    for key, side in (("chosen", chosen), ("rejected", rejected)):
        if side[-1].role != "assistant":
            name = getattr(fields, key)
            raise UnusableRow(
                f"last message of field {name!r} is not a response", f"end field {name!r} with an assistant message"
            )
    shared = chosen[:-1]
    require_question(shared, fields.chosen)
    _require_same_prompt(row, fields, shared)
    return _Sides(shared, chosen[-1], rejected[-1])


def _is_conversation(value: Any) -> bool:
    """Return whether a column holds several messages: a prompt with the response."""
    return isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 1


def _require_same_prompt(row: Mapping[str, Any], fields: Fields, shared: tuple[Message, ...]) -> None:
    """Raise UnusableRow for a prompt column that differs from the shared turns; as text it must be a user's message."""
    if fields.prompt is None or row.get(fields.prompt) is None:
        return
    prompt = row[fields.prompt]
    if isinstance(prompt, str):
        same = prompt.strip() in [message.content.strip() for message in shared if message.role == "user"]
    else:
        same = messages_of(prompt, fields.prompt, fields) == shared
    if not same:
        raise UnusableRow(
            f"field {fields.prompt!r} is not what the conversations begin with",
            "set Fields.prompt = None to take the turns that both share",
        )


def _read_margin(row: Mapping[str, Any], fields: Fields) -> float:
    if fields.margin is None:
        return 0.0
    value = value_of(row, fields.margin, "margin")
    try:
        margin = math.nan if isinstance(value, bool) else float(scalar_of(value, fields.margin))
    except (ValueError, OverflowError):
        margin = math.nan
    if not abs(margin) <= LARGEST_NUMBER:  # NaN neither
        raise UnusableRow(
            f"field {fields.margin!r} is not a finite number of float32",
            "give a number or unset Fields.margin",
            f" ({value!r:.40})",
        )
    return margin

"""What makes one row of a file unusable, found where the row is read or where its field is used."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from typing import Any

from rlhf_jax.errors import InputError


class Unlearnable(Exception):
    """A row that gives no record. args: (reason to count it under, remedy[, detail of this row, shown after the reason])."""


class UnusableRecord(InputError):
    """A record that cannot be encoded, raised where its id is not known. reason: what to count it under."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"{reason}; {remedy}")
        self.reason = reason


class FaultyObject(dict[str, Any]):
    """A JSON object that is not what its text says: it is kept until a record would be made of it. problem: what is wrong."""

    def __init__(self, content: Mapping[str, Any], problem: Unlearnable) -> None:
        super().__init__(content)
        self.problem = problem


def parse_json(text: str) -> Any:
    """The value of a JSON text. An object with a repeated key or nested too deeply becomes a `FaultyObject`; an integer
    with more digits than Python reads becomes infinity, which every number check refuses. Raises json.JSONDecodeError."""
    try:
        return _DECODER.decode(text)
    except RecursionError:
        return FaultyObject({}, Unlearnable("the row is nested too deeply to be read", "flatten it"))


def check_value(value: Any, name: str) -> None:
    """Raises Unlearnable for what no record can hold, at any depth of ``value``: half a surrogate pair, a faulty object, and
    inside of lists and objects NaN and infinity, which JSON lacks (a number by itself is checked where it is used).

    name: of the field, for the message.
    """
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            _check_text(item, name)
        elif isinstance(item, FaultyObject):
            raise item.problem
        elif isinstance(item, float) and item is not value and not math.isfinite(item):
            raise Unlearnable(
                f"field {name!r} holds {item!r}, not a finite number", "give a number, or null, or remove the row"
            )
        elif isinstance(item, Mapping):
            waiting += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple):
            waiting += item


def _check_text(text: str, name: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Unlearnable(
            f"field {name!r} holds half of a surrogate pair",
            "write the whole character or remove it (text cut by UTF-16 length ends so)",
            f" (\\u{ord(text[error.start]):04x} at character {error.start + 1})",
        ) from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) == len(pairs):
        return content
    names = [name for name, _ in pairs]
    repeated = next(name for name in names if names.count(name) > 1)
    return FaultyObject(content, Unlearnable("a key of the row occurs twice", "keep one of them", f" ({repeated!r})"))


def _integer(text: str) -> int | float:
    limit = sys.get_int_max_str_digits()
    return int(text) if not limit or len(text) <= limit else math.copysign(math.inf, -1 if text[0] == "-" else 1)


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer)

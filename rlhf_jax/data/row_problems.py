"""Errors of unusable rows and records, and checks of the values of a row."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from typing import Any

from rlhf_jax.errors import InputError


class UnusableRow(Exception):
    """An error of a row that gives no record. args: (reason to count it under, remedy[, detail to print after the reason])."""


class UnusableRecord(InputError):
    """An error of a record that cannot be encoded, raised where its id is not known. reason: the reason to count it under."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"{reason}; {remedy}")
        self.reason = reason


class FaultyObject(dict[str, Any]):
    """A JSON object that differs from its text; the error is raised when a record is made of it. problem: the error."""

    def __init__(self, content: Mapping[str, Any], problem: UnusableRow) -> None:
        super().__init__(content)
        self.problem = problem


def parse_json(text: str) -> Any:
    """Parse a JSON text.

    An object with a repeated key or nested too deeply becomes a `FaultyObject`; an integer with more digits than Python
    reads becomes infinity, which every check of numbers refuses. Raises json.JSONDecodeError.
    """
    try:
        return _DECODER.decode(text)
    except RecursionError:
        return FaultyObject({}, UnusableRow("the row is nested too deeply to be read", "flatten it"))


def check_value(value: Any, name: str) -> None:
    """Raise UnusableRow for a value that no record can hold, at any depth of ``value``.

    Such values are half a surrogate pair, a faulty object, and, inside of lists and objects, NaN and infinity, which JSON
    lacks (a number by itself is checked where it is used). name: of the field, for the message.
    """
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, str):
            _check_text(item, name)
        elif isinstance(item, FaultyObject):
            raise item.problem
        elif isinstance(item, float) and item is not value and not math.isfinite(item):
            raise UnusableRow(
                f"field {name!r} holds {item!r}, not a finite number", "give a number, or null, or remove the row"
            )
        elif isinstance(item, Mapping):
            pending += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple):
            pending += item


def _check_text(text: str, name: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UnusableRow(
            f"field {name!r} holds half of a surrogate pair",
            "write the whole character or remove it (text cut by UTF-16 length ends so)",
            f" (\\u{ord(text[error.start]):04x} at character {error.start + 1})",
        ) from None


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) == len(pairs):
        return content
    names = [name for name, _ in pairs]
    repeated = next(name for name in names if names.count(name) > 1)
    return FaultyObject(content, UnusableRow("a key of the row occurs twice", "keep one of them", f" ({repeated!r})"))


def _parse_integer(text: str) -> int | float:
    limit = sys.get_int_max_str_digits()
    return int(text) if not limit or len(text) <= limit else math.copysign(math.inf, -1 if text[0] == "-" else 1)


_DECODER = json.JSONDecoder(object_pairs_hook=_make_object, parse_int=_parse_integer)

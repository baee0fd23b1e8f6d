"""Errors for the user, and checks of values that raise them.

Every package may import this module; it imports no other module of this package.

"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any


class InputError(ValueError):
    """An invalid input of the user. The message is one line: the place (file, line, field, key), the problem and the remedy.

    The command-line programs print it without a traceback and exit with code 2.

    """


LARGEST_WHOLE = 2**31 - 1


SMALLEST_NUMBER, LARGEST_NUMBER = 2.0**-126, (2 - 2.0**-23) * 2.0**127
"""Bounds of float32, in which numbers of configurations are used; smaller numbers become 0 on the devices."""


def fits_float32(value: float) -> bool:
    """Return whether float32 represents ``value`` without underflow to 0 or overflow to infinity. Infinity itself fits."""
    return value == 0 or SMALLEST_NUMBER <= abs(value) <= LARGEST_NUMBER or abs(value) == math.inf


def require_whole(name: str, value: object, least: int) -> None:
    """Raise InputError unless ``value`` is a whole number >= ``least`` that int32 can hold. name: the key that the user set."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name} = {value!r}: give a whole number >= {least}")
    if value > LARGEST_WHOLE:
        raise InputError(f"{name} = {value!r}: give a whole number of at most {LARGEST_WHOLE}, which int32 can hold")


def require_one_of(name: str, value: object, allowed: Sequence[object]) -> None:
    """Raise InputError unless ``value`` is one of ``allowed``. name: the key that the user set."""
    if value not in allowed:
        raise InputError(f"{name} = {value!r}: one of {', '.join(map(repr, allowed))}")


def require_number(name: str, value: object, low: float, high: float = math.inf) -> None:
    """Raise InputError unless ``value`` is a number in [low, high]; NaN is not. name: the key that the user set."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        bounds = f">= {low}" if high == math.inf else f"in [{low}, {high}]"
        raise InputError(f"{name} = {value!r}: give a number {bounds}")
    if not fits_float32(value):
        raise InputError(
            f"{name} = {value!r}: float32, in which it is used, makes {'0' if abs(value) < 1 else 'infinity'} of it"
        )


class RunStopped(RuntimeError):
    """A check stopped the run (non-finite number, sampler and scorer disagree, ...). Exit code 3."""


def check_unused(config: Any, *names: str) -> None:
    """Check that fields which an experiment does not read have their default. Raises InputError for a binding without effect."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in names and value != field.default:
            raise InputError(f"{type(config).__name__}.{field.name} = {value!r}: has no effect here; remove it")

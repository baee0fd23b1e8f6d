"""Reading of the files that programs of this package write: from bytes to a checked object.

Every problem is one InputError with the place and a remedy: a missing or unreadable file, a directory or a pipe in its place,
invalid UTF-8 or JSON, unlimited nesting, NaN and infinities, a duplicate key, half a surrogate pair, a value of another type.

"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import stat
from pathlib import Path
from typing import Any

from rlhf_jax.errors import InputError

RESTORE = "restore the file"
_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")


class _Unusable(ValueError):
    """JSON that Python's parser accepts and this package refuses."""


def read_bytes(path: Path, remedy: str = RESTORE) -> bytes:
    """Read the content of a regular file. A pipe or a device is refused without waiting for it. Raises InputError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            mode = os.fstat(descriptor).st_mode
            if not stat.S_ISREG(mode):
                raise InputError(f"{path}: {_describe_kind(mode)}, not a file; {remedy}")
            return file.read()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: cannot be read ({_describe_error(error)}); {remedy}") from error


def read_text(path: Path, remedy: str = RESTORE) -> str:
    """Read the UTF-8 text of a file. Raises InputError."""
    try:
        return read_bytes(path, remedy).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); {remedy}") from error


def parse_json(text: str, place: str, remedy: str = RESTORE, *, finite: bool = True) -> Any:
    """Parse a JSON text.

    place: a file or FILE:LINE, for messages. finite: refuse NaN and infinities. Raises InputError.

    """
    strict: dict[str, Any] = {"parse_constant": _refuse_constant, "parse_float": _parse_finite} if finite else {}
    try:
        value = json.loads(text, object_pairs_hook=_build_object, **strict)
        if _HALF_PAIR.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        where = place if re.search(r":\d+$", place) else f"{place}:{error.lineno}"
        raise InputError(f"{where}: not JSON ({error.msg}); {remedy}") from error
    except RecursionError as error:
        raise InputError(f"{place}: not usable JSON (nested too deeply); {remedy}") from error
    except UnicodeEncodeError as error:
        raise InputError(f"{place}: not usable JSON (half a surrogate pair in a text); {remedy}") from error
    except ValueError as error:  # _Unusable, or a whole number of thousands of digits
        raise InputError(f"{place}: not usable JSON ({error}); {remedy}") from error
    return value


def parse_object(text: str, place: str, remedy: str = RESTORE, *, finite: bool = True) -> dict[str, Any]:
    """Parse the JSON object of a text. Raises InputError, also for another JSON value."""
    value = parse_json(text, place, remedy, finite=finite)
    if not isinstance(value, dict):
        raise InputError(f"{place}: must hold a JSON object, holds a {type(value).__name__}; {remedy}")
    return value


def read_object(path: Path, remedy: str = RESTORE, *, finite: bool = True) -> dict[str, Any]:
    """Read the JSON object of a file. Raises InputError."""
    return parse_object(read_text(path, remedy), str(path), remedy, finite=finite)


def json_text(content: Any, *, indent: int | None = None, sort_keys: bool = False, ensure_ascii: bool = True) -> str:
    """Format a value as JSON with a final newline. NaN and infinities, which JSON lacks, become null."""
    plain = _replace_nan(content)
    return json.dumps(plain, indent=indent, sort_keys=sort_keys, ensure_ascii=ensure_ascii, allow_nan=False) + "\n"


def _replace_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _replace_nan(item) for key, item in value.items()}
    return [_replace_nan(item) for item in value] if isinstance(value, list | tuple) else value


def field(content: dict[str, Any], key: str, kind: type | tuple[type, ...], place: str, remedy: str = RESTORE) -> Any:
    """Return ``content[key]``. Raises InputError when it is missing or of another type; True and False are no numbers."""
    value = content.get(key)
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if key not in content:
        raise InputError(f"{place}: no field {key!r}; {remedy}")
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        expected = " or ".join(k.__name__ for k in kinds)
        raise InputError(f"{place}: field {key!r} is {type(value).__name__}, not {expected}; {remedy}")
    return value


def _describe_kind(mode: int) -> str:
    names = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return names.get(stat.S_IFMT(mode), "a device")


def _describe_error(error: OSError | ValueError) -> str:
    number = getattr(error, "errno", None)
    return "a pipe or a socket" if number == errno.ENXIO else os.strerror(number) if number else str(error)


def _build_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _Unusable(f"key {twice!r} occurs twice")
    return content


def _refuse_constant(text: str) -> Any:
    raise _Unusable(f"{text} is not a number")


def _parse_finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise _Unusable(f"{text} is too large for a number")
    return value


def write_atomically(path: Path, text: str) -> None:
    """Write a temporary file and rename it: readers see the old or the new file; a full disk leaves no partial file."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise

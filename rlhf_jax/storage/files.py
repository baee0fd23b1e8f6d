"""The one reader of the files that programs of this package write and read back: bytes in, a checked object out.

Whatever is wrong is one InputError with the place and a remedy: no such file, no permission, a directory or a pipe in place
of the file, other bytes than UTF-8, no JSON, nesting without end, NaN and infinities, a key that occurs twice, half a
surrogate pair, another type than asked for.
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
    """JSON that Python's parser would take and that no file of ours may hold."""


def read_bytes(path: Path, remedy: str = RESTORE) -> bytes:
    """Returns the content of a regular file. A pipe or a device is refused, not waited for. Raises InputError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            mode = os.fstat(descriptor).st_mode
            if not stat.S_ISREG(mode):
                raise InputError(f"{path}: {_kind(mode)}, not a file; {remedy}")
            return file.read()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: cannot be read ({_reason(error)}); {remedy}") from error


def read_text(path: Path, remedy: str = RESTORE) -> str:
    """Returns the UTF-8 text of a file. Raises InputError."""
    try:
        return read_bytes(path, remedy).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); {remedy}") from error


def parse_json(text: str, place: str, remedy: str = RESTORE, *, finite: bool = True) -> Any:
    """Returns the value of a JSON text. place: for messages, a file or FILE:LINE. finite: NaN and infinities are refused.

    Raises InputError.
    """
    strict: dict[str, Any] = {"parse_constant": _no_number, "parse_float": _finite} if finite else {}
    try:
        value = json.loads(text, object_pairs_hook=_object, **strict)
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
    """Returns the JSON object of a text. Raises InputError, also for another JSON value."""
    value = parse_json(text, place, remedy, finite=finite)
    if not isinstance(value, dict):
        raise InputError(f"{place}: must hold a JSON object, holds a {type(value).__name__}; {remedy}")
    return value


def read_object(path: Path, remedy: str = RESTORE, *, finite: bool = True) -> dict[str, Any]:
    """Returns the JSON object of a file. Raises InputError."""
    return parse_object(read_text(path, remedy), str(path), remedy, finite=finite)


def json_text(content: Any, *, indent: int | None = None, sort_keys: bool = False, ensure_ascii: bool = True) -> str:
    """Returns a JSON text with a line end, as every file of ours is written: NaN and infinities, which JSON lacks, are null."""
    plain = _without_nan(content)
    return json.dumps(plain, indent=indent, sort_keys=sort_keys, ensure_ascii=ensure_ascii, allow_nan=False) + "\n"


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return [_without_nan(item) for item in value] if isinstance(value, list | tuple) else value


def field(content: dict[str, Any], key: str, kind: type | tuple[type, ...], place: str, remedy: str = RESTORE) -> Any:
    """Returns ``content[key]``. Raises InputError when it is missing or of another type; True and False are no numbers."""
    value = content.get(key)
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if key not in content:
        raise InputError(f"{place}: no field {key!r}; {remedy}")
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        wanted = " or ".join(k.__name__ for k in kinds)
        raise InputError(f"{place}: field {key!r} is {type(value).__name__}, not {wanted}; {remedy}")
    return value


def _kind(mode: int) -> str:
    names = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return names.get(stat.S_IFMT(mode), "a device")


def _reason(error: OSError | ValueError) -> str:
    number = getattr(error, "errno", None)
    return "a pipe or a socket" if number == errno.ENXIO else os.strerror(number) if number else str(error)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _Unusable(f"key {twice!r} occurs twice")
    return content


def _no_number(text: str) -> Any:
    raise _Unusable(f"{text} is not a number")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise _Unusable(f"{text} is too large for a number")
    return value


def write_atomically(path: Path, text: str) -> None:
    """Write and rename: a reader sees the old file or the new one, never half of one; a full disk leaves nothing of it."""
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

"""Cleaning of messages (control characters, passwords), and output streams whose failure does not end a program.

Texts of files, configurations and models appear in messages. A terminal interprets control characters in them: ESC and C1
sequences change its colours, title or clipboard, CR overwrites a line, bidirectional overrides reorder the text.

"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
from typing import Any, TextIO, cast

_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff\U000e0000-\U000e007f]"
)
_PASSWORD = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)[^\s/?#'\"@]*:[^\s/?#'\"]*@")
_LONE_TOKEN = re.compile(r"(?P<scheme>https?://)[^\s/?#'\"@:]{16,}@")
_PARAMETER = re.compile(
    r"(?P<name>[?&;](?:[\w.-]*(?:token|secret|password|passwd|signature|credential|api[_-]?key|apikey|access[_-]?key)"
    r"[\w.-]*|sig|key|auth|code))=[^&\s'\"#;]+",
    re.IGNORECASE,
)
HIDDEN = "***"


def printable(text: str) -> str:
    """Escape control characters: ESC becomes \\x1b. Line ends, tabs and all letters stay."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape", "surrogatepass").decode(), text)


def without_secrets(text: str) -> str:
    """Replace passwords and tokens in URLs by ***: https://user:word@host, https://host/file?token=word."""
    if "://" not in text:
        return text
    text = _PASSWORD.sub(lambda match: f"{match['scheme']}{HIDDEN}@", text)
    text = _LONE_TOKEN.sub(lambda match: f"{match['scheme']}{HIDDEN}@", text)
    return _PARAMETER.sub(lambda match: f"{match['name']}={HIDDEN}", text)


def one_line(text: str) -> str:
    """Replace all white space, line ends included, by single spaces."""
    return " ".join(text.split())


def message(text: str) -> str:
    """Clean a text for a message: escape control characters and hide secrets."""
    return printable(without_secrets(text))


def say_at_once(text: str) -> None:
    """Write a line to stderr without buffers: for signal handlers and other threads. Never raises OSError."""
    with contextlib.suppress(OSError):
        os.write(2, f"{message(text)}\n".encode())


class Steady:
    """A text stream that ignores errors of the stream behind it: a closed pipe or terminal, a full disk.

    lost: the first error, after which output is lost; None when there was none.

    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.lost: OSError | None = None

    def write(self, text: str) -> int:
        try:
            self.stream.write(text)
        except OSError as error:
            self._lose(error)
        return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError as error:
            self._lose(error)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def _lose(self, error: OSError) -> None:
        """Record the error and redirect the descriptor to /dev/null, for buffers and for output of libraries."""
        self.lost = self.lost or error
        with contextlib.suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), self.stream.fileno())
            self.stream.flush()


class Messages(Steady):
    """A steady stream that cleans its texts (`message`)."""

    def write(self, text: str) -> int:
        bar = text.startswith("\r")  # progress bars of libraries begin so; messages of this package never do
        return super().write("\r" * bar + message(text[bar:]))


class _Drawing(Steady):
    """A steady stream that passes control characters; its errors are those of the stream of messages that it stands for."""

    def __init__(self, messages: Messages) -> None:
        super().__init__(messages.stream)
        self._messages = messages

    def _lose(self, error: OSError) -> None:
        self._messages._lose(error)


def behind(stream: TextIO) -> TextIO:
    """Return a stream that passes control characters, for libraries that draw with them (rich).

    Texts from data, models and configurations must be cleaned by `message` before they are drawn.
    """
    return cast(TextIO, _Drawing(stream) if isinstance(stream, Messages) else stream)


def steady_output() -> None:
    """Replace stdout and stderr by `Messages`. A program calls it first; a second call changes nothing.

    A descriptor that was closed when the program started is opened on /dev/null: otherwise the next file would get its number,
    and output to "stderr" would go into that file.

    """
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if isinstance(stream, Messages):
            continue
        if stream is None:
            stream = _nowhere(descriptor)
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, cast(TextIO, Messages(stream)))


def lost_output() -> OSError | None:
    """Return the error that lost a part of stdout; None when there was none, or the reader closed the pipe."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    lost = getattr(sys.stdout, "lost", None)
    return None if lost is None or lost.errno == errno.EPIPE else lost


def _nowhere(descriptor: int) -> TextIO:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.fstat(descriptor)  # the number is in use by now
    except OSError:
        os.dup2(nowhere, descriptor)
    return os.fdopen(nowhere, "w")

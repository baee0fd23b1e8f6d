"""What may stand in a message: no control characters, no passwords; and streams for messages that never end a program.

Texts of files, configurations and models reach messages. A terminal would obey the control characters in them: ESC and C1
sequences recolour it, rename it or fill its clipboard, CR overwrites a line, bidi overrides reorder what is read.
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
    """Escapes what a terminal would obey: ESC becomes \\x1b. Line ends and tabs stay; so does every letter."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape", "surrogatepass").decode(), text)


def without_secrets(text: str) -> str:
    """Replaces passwords and tokens in URLs by ***: https://user:word@host, https://host/file?token=word."""
    if "://" not in text:
        return text
    text = _PASSWORD.sub(lambda match: f"{match['scheme']}{HIDDEN}@", text)
    text = _LONE_TOKEN.sub(lambda match: f"{match['scheme']}{HIDDEN}@", text)
    return _PARAMETER.sub(lambda match: f"{match['name']}={HIDDEN}", text)


def one_line(text: str) -> str:
    """Returns the text with white space, line ends included, as single spaces."""
    return " ".join(text.split())


def message(text: str) -> str:
    """Returns a text as it may stand in a message: printable, without secrets."""
    return printable(without_secrets(text))


def say_at_once(text: str) -> None:
    """Writes a line to stderr past every buffer: for signal handlers and other threads. Never raises OSError."""
    with contextlib.suppress(OSError):
        os.write(2, f"{message(text)}\n".encode())


class Steady:
    """A text stream in front of another. A reader that is gone, a terminal that was closed or a full disk loses what follows and
    does not end the program.

    lost: why something was lost, None when nothing was.
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
        """What is in buffers, and what libraries write, goes nowhere from now on."""
        self.lost = self.lost or error
        with contextlib.suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), self.stream.fileno())
            self.stream.flush()


class Messages(Steady):
    """A steady stream whose texts are made fit for a message first (`message`)."""

    def write(self, text: str) -> int:
        bar = text.startswith("\r")  # as progress bars of libraries begin; a message of ours never does
        return super().write("\r" * bar + message(text[bar:]))


def behind(stream: TextIO) -> TextIO:
    """Returns a steady stream that takes control characters, for what draws with them (rich) texts that are printable."""
    return cast(TextIO, Steady(stream.stream) if isinstance(stream, Messages) else stream)


def steady_output() -> None:
    """Puts `Messages` in front of stdout and stderr. A program calls it first; a second call changes nothing.

    A descriptor that the program was started without is opened on nothing: the next file opened would get its number, and
    whatever writes to "stderr" would write into that file.
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
    """Returns why a part of stdout was lost; None when nothing was, or nobody wanted to read it (a closed pipe)."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    lost = getattr(sys.stdout, "lost", None)
    return None if lost is None or lost.errno == errno.EPIPE else lost


def _nowhere(descriptor: int) -> TextIO:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.fstat(descriptor)  # somebody has the number by now
    except OSError:
        os.dup2(nowhere, descriptor)
    return os.fdopen(nowhere, "w")

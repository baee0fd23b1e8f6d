"""Command lines of scripts: flags, and errors in one line with exit code 2 or 3, except for bugs."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable, Sequence

from absl import flags

from rlhf_jax.errors import InputError, RunStopped
from rlhf_jax.messages import lost_output, one_line, steady_output

BAD_INPUT, STOPPED_BY_GUARD = 2, 3
"""Exit codes: an error in the user's input; a run that a guard or the machine stopped."""
_MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""Errors of the machine that are not caused by the user's input: the same command may succeed later."""
_FULL = re.compile(r"No space left on device|os error 28\b|Disk quota exceeded|File too large", re.IGNORECASE)


def parse_flags(argv: Sequence[str]) -> None:
    """Parse absl's flags in ``argv``; absl's own error prints a page of usage.

    Raises InputError for unknown or missing flags, values that do not fit, and anything that is not a flag.
    """
    try:
        positional = flags.FLAGS(list(argv))
    except flags.Error as error:
        raise InputError(f"{one_line(str(error))} (--help lists the flags)") from error
    if len(positional) > 1:
        raise InputError(f"unexpected argument {positional[1]!r}; everything is a flag (--help lists them)")


def asks_for_help(argv: Sequence[str]) -> bool:
    """Return whether --help or -h is among the arguments."""
    return "--help" in argv or "-h" in argv


def usage(words: str, names: Sequence[str]) -> str:
    """Return the text of --help: ``words`` (a script's docstring) and its flags."""
    return words.strip() + "\n\nflags:\n" + "\n".join(f"  --{name}: {flags.FLAGS[name].help}" for name in names)


def explain_os_error(error: OSError) -> str:
    """Return the path and the operating system's words: '/data/x.jsonl: Permission denied'."""
    text = re.split(r"\n  In call to configurable", str(error))[0]  # gin's addition
    names = [
        os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes | os.PathLike)
    ]
    if error.strerror and names:
        return one_line(f"{' -> '.join(names)}: {error.strerror}")
    if match := re.fullmatch(r"\[Errno -?\d+\] (.*?)(?:: '(.*?)'(?: -> '(.*)')?)?", text, re.DOTALL):
        names = [name for name in match.groups()[1:] if name]
        return one_line(f"{' -> '.join(names)}: {match[1]}" if names else match[1])
    return one_line(text) or type(error).__name__


def exit_code_for(error: Exception) -> int | None:
    """Return the exit code for ``error``; None for a bug, whose traceback is shown.

    3: a guard stopped the run, the disk is full, a device failed. 2: an error in the user's input: an InputError, a
    path that is missing or not allowed.
    """
    if isinstance(error, RunStopped):
        return STOPPED_BY_GUARD
    if isinstance(error, InputError):
        return BAD_INPUT
    if _FULL.search(str(error)) or any(
        isinstance(cause, OSError) and cause.errno in _MACHINE for cause in _causes(error)
    ):
        return STOPPED_BY_GUARD
    return BAD_INPUT if isinstance(error, OSError) else None


def error_line(error: Exception) -> str:
    """Return the line for an error that `exit_code_for` knows: 'error: ...' or 'stopped: ...'."""
    words = explain_os_error(error) if isinstance(error, OSError) else one_line(str(error))
    return f"{'stopped' if exit_code_for(error) == STOPPED_BY_GUARD else 'error'}: {words}"


def finish(code: int) -> int:
    """Return the exit code of a program that ends with ``code``: 3 when it was 0 and a part of stdout is lost."""
    lost = lost_output()
    if lost is None or code:
        return code
    print(f"stopped: stdout: {lost.strerror}; a part of the output is lost", file=sys.stderr)
    return STOPPED_BY_GUARD


def _causes(error: BaseException | None) -> list[BaseException]:
    causes: list[BaseException] = []
    while error is not None and error not in causes:
        causes.append(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return causes


def run_command(command: Callable[[], int], argv: Sequence[str], words: str, names: Sequence[str]) -> int:
    """Parse the flags in ``argv``, run ``command()`` and return the exit code.

    The code of ``command``, 0 for --help, 2 for an InputError, 2 or 3 for an error of the operating system (`exit_code_for`).

    words, names: the script's docstring and its own flags, for --help.
    """
    steady_output()
    if asks_for_help(argv):
        print(usage(words, names))
        return finish(0)
    try:
        parse_flags(argv)
        return finish(command())
    except Exception as error:
        code = exit_code_for(error)
        if code is None:
            raise
        print(error_line(error), file=sys.stderr)
        return code

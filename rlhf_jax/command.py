"""The command line of a script: flags, and one line with exit code 2 for what its user can get wrong."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from absl import flags

from rlhf_jax.types import InputError


def one_line(text: str) -> str:
    """White space, line ends included, as single spaces."""
    return " ".join(text.split())


def parse_flags(argv: Sequence[str]) -> None:
    """absl's flags of ``argv``, whose own parser ends in a page of usage.

    Raises InputError for unknown or missing flags, values that do not fit, and anything that is not a flag.
    """
    try:
        rest = flags.FLAGS(list(argv))
    except flags.Error as error:
        raise InputError(f"{one_line(str(error))} (--help lists the flags)") from error
    if len(rest) > 1:
        raise InputError(f"unexpected argument {rest[1]!r}; everything is a flag (--help lists them)")


def asks_for_help(argv: Sequence[str]) -> bool:
    """Whether --help or -h is among the arguments."""
    return "--help" in argv or "-h" in argv


def usage(words: str, names: Sequence[str]) -> str:
    """``words`` (a script's docstring) and its flags."""
    return words.strip() + "\n\nflags:\n" + "\n".join(f"  --{name}: {flags.FLAGS[name].help}" for name in names)


def run_command(command: Callable[[], int], argv: Sequence[str], words: str, names: Sequence[str]) -> int:
    """Exit code of ``command()`` after the flags of ``argv`` are parsed: its own, 0 for --help, 2 for an InputError.

    words, names: the script's docstring and its own flags, for --help.
    """
    if asks_for_help(argv):
        print(usage(words, names))
        return 0
    try:
        parse_flags(argv)
        return command()
    except InputError as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        return 2

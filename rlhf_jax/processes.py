"""Child processes that end with their parent, also after a crash, a deadline or ``kill -9``.

Used by reward workers (`end_with_parent`) and for programs that other programs start (`tied_to_parent`). Linux
sends the signal itself (prctl(2), PR_SET_PDEATHSIG), also to a process that holds Python's lock in one long call. On other
systems a thread of the child checks every `LOOK_EVERY` seconds whether its parent has changed.

"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

PR_SET_PDEATHSIG = 1
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""The signals that ask a program to save and leave."""
STOPPED = tuple(128 + number for number in STOPPING)
"""Exit codes of a program that saved and left after one of these signals."""
LOOK_EVERY = 0.5
VARIABLE = "RLHF_JAX_PARENT"
"""Environment variable with the parent's process id, for a program that watches its parent itself."""

_TIED = f"""
import ctypes, os, sys
ctypes.CDLL(None).prctl({PR_SET_PDEATHSIG}, {int(signal.SIGTERM)})
if os.getppid() != int(sys.argv[1]):
    sys.exit({128 + signal.SIGTERM})
os.execvp(sys.argv[2], sys.argv[2:])
"""
"""Runs the program in its arguments; the setting survives exec. A parent that died before prctl is detected too."""


@dataclass(frozen=True)
class Parent:
    """The identity of a process that starts others (it can be pickled).

    pid: its process id.
    lasting: whether the thread that starts them lives as long as the process; Linux signals the end of that *thread*.

    """

    pid: int
    lasting: bool


def this_process() -> Parent:
    """Return the identity of the calling process, for its children. Call it in the thread that starts the child."""
    return Parent(os.getpid(), threading.current_thread() is threading.main_thread())


def end_with_parent(parent: Parent) -> None:
    """Make the calling process end by SIGKILL as soon as ``parent`` ends. The first call of a worker.

    Nothing is cleaned up: a worker has no state to save.

    """
    if sys.platform == "linux" and parent.lasting:
        _set_death_signal(signal.SIGKILL)
    else:
        _watch(parent.pid, signal.SIGKILL)
    if os.getppid() != parent.pid:  # it ended before
        os.kill(os.getpid(), signal.SIGKILL)


def tied_to_parent(command: Sequence[str]) -> list[str]:
    """Return a command that runs ``command`` and sends it SIGTERM when the calling process ends.

    The process id stays that of the program. On other systems than Linux the program watches its parent itself: it is started with
    `parent_variable` and calls `watch_parent`.

    """
    if sys.platform != "linux":
        return list(command)
    return [sys.executable, "-S", "-c", _TIED, str(os.getpid()), *command]


def parent_variable() -> dict[str, str]:
    """Return the environment of a program that calls `watch_parent`; empty on Linux, where the kernel sends the signal."""
    return {} if sys.platform == "linux" else {VARIABLE: str(os.getpid())}


def watch_parent() -> None:
    """Send the calling process SIGTERM when the parent named in its environment ends; do nothing without one.

    The variable is removed, since children of this process have another parent.

    """
    pid = os.environ.pop(VARIABLE, "")
    if pid.isdecimal():
        _watch(int(pid), signal.SIGTERM)


def _set_death_signal(number: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, int(number)) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl(PR_SET_PDEATHSIG): {os.strerror(code)}")


def _watch(pid: int, number: int) -> None:
    def look() -> None:
        while os.getppid() == pid:
            time.sleep(LOOK_EVERY)
        os.kill(os.getpid(), number)

    threading.Thread(target=look, name="parent", daemon=True).start()

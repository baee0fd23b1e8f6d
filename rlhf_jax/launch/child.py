"""Run another program to its end and stop it as it wants to be stopped. For what starts experiments: pipelines, sweeps."""

from __future__ import annotations

import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from rlhf_jax.processes import STOPPED, STOPPING, parent_variable, tied_to_parent

__all__ = ["STOPPED", "STOPPING", "run_child"]


def run_child(command: Sequence[str], environment: Mapping[str, str], *, output: Path | None = None) -> int:
    """The exit code of ``command``; 128 + n when signal n ended it.

    SIGTERM, SIGINT and SIGHUP that reach this process are passed on, and the child is waited for: an experiment finishes its
    step and saves. (``subprocess.run`` kills the child 0.25 s after Ctrl-C.) A child that succeeds nevertheless still
    counts as stopped, 128 + n: whoever asked wants no more children to start.
    However this process ends, the child gets SIGTERM (`rlhf_jax.processes`).
    output: a file that gets stdout and stderr, appended; None: those of this process.
    """
    received: list[int] = []
    waiting: list[int] = []  # not passed on yet
    process: subprocess.Popen[bytes] | None = None

    def forward(number: int, _frame: FrameType | None = None) -> None:
        received.append(number)
        waiting.append(number)
        pass_on()

    def pass_on() -> None:
        while waiting and process is not None:
            process.send_signal(waiting.pop())  # does nothing when it has ended

    main = threading.current_thread() is threading.main_thread()
    before = {n: signal.signal(n, forward) for n in STOPPING if not _ignored(n)} if main else {}
    file = output.open("ab") if output is not None else None
    try:
        # A group of its own: Ctrl-C in a terminal goes to the whole group, and two signals mean "exit at once".
        with subprocess.Popen(
            tied_to_parent(command),
            env={**environment, **parent_variable()},
            process_group=0,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
        ) as process:
            pass_on()  # what came while it was being started
            code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if file is not None:
            file.close()
    code = 128 - code if code < 0 else code
    return 128 + received[0] if received and code == 0 else code


def _ignored(number: int) -> bool:
    """Whether the program was started with SIGHUP ignored (nohup); its children then ignore it too."""
    return number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN

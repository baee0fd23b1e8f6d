"""Child processes of pipelines and sweeps: signals are forwarded, and the child may save before it ends."""

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
    """Run ``command`` to its end and return its exit code; 128 + n when signal n ended it.

    SIGTERM, SIGINT and SIGHUP are forwarded to the child, and this process waits for it: an experiment finishes its step
    and saves. (``subprocess.run`` kills the child 0.25 s after Ctrl-C.) After signal n, a child that exits with 0 still
    returns 128 + n, so that the caller starts no more children.
    However this process ends, the child gets SIGTERM (`rlhf_jax.processes`).
    output: a file that gets stdout and stderr, appended; None: those of this process.
    """
    received: list[int] = []
    pending: list[int] = []  # not forwarded yet
    process: subprocess.Popen[bytes] | None = None

    def forward(number: int, _frame: FrameType | None = None) -> None:
        received.append(number)
        pending.append(number)
        send_pending()

    def send_pending() -> None:
        while pending and process is not None:
            process.send_signal(pending.pop())  # does nothing when it has ended

    main = threading.current_thread() is threading.main_thread()
    before = {n: signal.signal(n, forward) for n in STOPPING if not _is_ignored(n)} if main else {}
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
            send_pending()  # signals that arrived while it was being started
            code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if file is not None:
            file.close()
    code = 128 - code if code < 0 else code
    return 128 + received[0] if received and code == 0 else code


def _is_ignored(number: int) -> bool:
    """Return whether the program was started with SIGHUP ignored (nohup); its children then ignore it too."""
    return number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN

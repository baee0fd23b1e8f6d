"""Handling of SIGTERM, SIGINT and SIGHUP (a closed terminal or connection) in a run.

First signal inside the loop: the current step is finished and saved, and the program exits with 143, 130 or 129. Outside
the loop there is nothing to save, and the program exits at once with the same codes. A second signal exits at once; a
second SIGHUP is ignored, since kernel and shell both send one. Python runs a handler only between two instructions of the
interpreter, and a step is one long call: a thread therefore reads the signals from a wake-up pipe, also during a step.

JAX's preemption service (jax.distributed) would handle SIGTERM itself and choose the step to stop at. It is not used:
these handlers replace its handler, `agreed` makes every process stop at the same step, and a run of one process (where
that service does not exist) behaves as a run of many.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from rlhf_jax.messages import say_at_once
from rlhf_jax.processes import STOPPING


class Signals:
    """A context manager. received: the first signal, 0 for none. since: its time (time.monotonic), 0 for none."""

    def __init__(self) -> None:
        self.received = 0
        self.since = 0.0
        self.in_loop = False
        self._before: dict[int, Any] = {}
        self._old_wakeup = -1
        self._read, self._write = socket.socketpair()

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.received:
            if number == signal.SIGHUP:
                return
            os._exit(128 + number)
        self.received, self.since = number, time.monotonic()
        if not self.in_loop:
            raise SystemExit(128 + number)
        # Past the buffers: a handler may run in the middle of another print, whose buffer is not re-entrant.
        say_at_once(f"\n{signal.Signals(number).name}: finishing the step and saving; again to exit at once")

    def _listen(self) -> None:
        """Handle signals while the main thread is inside a compiled step or a compilation."""
        count = 0
        while data := self._read.recv(64):
            for number in data:
                if number not in STOPPING:
                    continue
                self.since = self.since or time.monotonic()
                again, count = count and number != signal.SIGHUP, count + 1
                if again:
                    os._exit(128 + number)

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self._write.setblocking(False)
            self._old_wakeup = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
            threading.Thread(target=self._listen, name="signals", daemon=True).start()
            for number in STOPPING:
                if signal.getsignal(number) != signal.SIG_IGN or number != signal.SIGHUP:  # nohup: to be ignored
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._before:
            signal.set_wakeup_fd(self._old_wakeup)
        self._write.close()  # ends the thread

    def agreed(self) -> int:
        """Return the signal that all processes act on, 0 for none; a process that stopped alone would hang the others."""
        if jax.process_count() == 1:
            return self.received
        return int(np.max(multihost_utils.process_allgather(np.int32(self.received))))

"""Deadlines of the phases of a step: a hang ends in a stack trace of every thread and exit code 4."""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from rlhf_jax.messages import say_at_once

HUNG = 4
"""Exit code of a run that a deadline ended."""
CHECK_EVERY = 0.25
SUSPENDED_AFTER, BUSY_SHARE = 2.0, 0.1
"""A gap between two checks of more than these seconds, with less than this share of CPU time, means a suspended process."""


class Watchdog:
    """A thread that ends the process with HUNG once a deadline has passed, after writing DIRECTORY/stacks.txt.

    Nothing is saved: the main thread hangs, and the newest checkpoint is complete. A context manager.

    A suspended process (SIGSTOP, a suspended machine) does not hang. The thread was suspended too: a gap between two
    checks in which the process used almost no CPU time does not count towards any deadline.
    """

    def __init__(
        self, directory: Path, deadlines: Mapping[str, float], stop_within: float, stopping_since: Callable[[], float]
    ) -> None:
        """Set the deadlines.

        deadlines: {phase: seconds}; 'step' is the whole step.
        stop_within: seconds from a signal to the end of the process.
        stopping_since: returns the time of the signal (time.monotonic), 0 for none.
        """
        self._directory, self._deadlines = directory, dict(deadlines)
        self._stop_within, self._stopping_since = stop_within, stopping_since
        self._step, self._step_began = 0, 0.0
        self._phase, self._phase_began = "", 0.0
        self._closed = threading.Event()
        self._checked, self._computed = time.monotonic(), time.process_time()
        self._suspended, self._suspended_before_signal = 0.0, -1.0

    def enter(self, phase: str, step: int, *, first: bool = False) -> None:
        """Start ``phase`` of ``step``; first: the step starts too; phase '': watch no deadline."""
        self._phase, self._phase_began = phase, time.monotonic() - self._suspended
        if first or not phase:
            self._step, self._step_began = step, self._phase_began if phase else 0.0

    def overdue(self, clock: float) -> str:
        """Return a message about a deadline that has passed, '' for none. clock: time.monotonic()."""
        since = self._stopping_since()
        if since and self._suspended_before_signal < 0:
            self._suspended_before_signal = self._suspended
        if since and clock - since - (self._suspended - self._suspended_before_signal) > self._stop_within:
            return f"not stopped within {self._stop_within:g} s of the signal (LoopConfig.stop_within)"
        for name, began in ((self._phase, self._phase_began), ("step", self._step_began)):
            limit = self._deadlines.get(name)
            if limit is not None and began and clock - self._suspended - began > limit:
                return f"step {self._step}: {name} took longer than {limit:g} s (LoopConfig.deadlines)"
        return ""

    def look(self, clock: float, computed: float) -> str:
        """Check the deadlines, after a suspension since the last check is excluded; return `overdue`.

        clock: time.monotonic(). computed: time.process_time().
        """
        gap = clock - self._checked
        if gap > SUSPENDED_AFTER and computed - self._computed < BUSY_SHARE * gap:
            self._suspended += gap
        self._checked, self._computed = clock, computed
        return self.overdue(clock)

    def _watch(self) -> None:
        while not self._closed.wait(CHECK_EVERY):
            if message := self.look(time.monotonic(), time.process_time()):
                say_at_once(f"\nstopped: {message}; {self._write_stacks(message)}")
                os._exit(HUNG)

    def _write_stacks(self, message: str) -> str:
        """Write the stacks of all threads; return a clause that names the file, or the error of a full disk."""
        file = self._directory / "stacks.txt"
        try:
            with file.open("a") as stacks:
                stacks.write(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {message}; phase {self._phase}\n")
                stacks.flush()
                faulthandler.dump_traceback(stacks, all_threads=True)
        except OSError as error:
            return f"the stacks of all threads could not be written ({error.strerror})"
        return f"the stacks of all threads are in {file}"

    def __enter__(self) -> Watchdog:
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()

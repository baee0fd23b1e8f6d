"""A deadline for every phase of a step: what hangs ends in a stack trace of every thread and an exit code of its own."""

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
LOOK_EVERY = 0.25
ASLEEP_AFTER, BUSY = 2.0, 0.1
"""Seconds without a look, and the share of them spent computing, from which on the process was not hanging but stopped."""


class Watchdog:
    """A thread that ends the process with HUNG once a deadline has passed, after writing DIRECTORY/stacks.txt.

    Nothing is saved then: the main thread hangs, and the newest checkpoint is whole. A context manager.

    A process that was stopped (SIGSTOP, a suspended machine) did not hang. The thread then did not look either: a gap
    between two looks in which the process computed next to nothing does not count towards any deadline.
    """

    def __init__(
        self, directory: Path, deadlines: Mapping[str, float], stop_within: float, stopping_since: Callable[[], float]
    ) -> None:
        """deadlines: {phase: seconds}; 'step' is the whole step. stop_within: seconds from a signal to the end of the
        process. stopping_since: when the signal came (time.monotonic), 0 for none."""
        self._directory, self._deadlines = directory, dict(deadlines)
        self._stop_within, self._stopping_since = stop_within, stopping_since
        self._step, self._step_began = 0, 0.0
        self._phase, self._phase_began = "", 0.0
        self._closed = threading.Event()
        self._looked, self._computed = time.monotonic(), time.process_time()
        self._asleep, self._asleep_before_signal = 0.0, -1.0

    def enter(self, phase: str, step: int, *, first: bool = False) -> None:
        """``phase`` of ``step`` begins now; first: so does the step. phase '': nothing is watched any more."""
        self._phase, self._phase_began = phase, time.monotonic() - self._asleep
        if first or not phase:
            self._step, self._step_began = step, self._phase_began if phase else 0.0

    def overdue(self, now: float) -> str:
        """What has passed its deadline, in words; '' while nothing has. now: time.monotonic()."""
        since = self._stopping_since()
        if since and self._asleep_before_signal < 0:
            self._asleep_before_signal = self._asleep
        if since and now - since - (self._asleep - self._asleep_before_signal) > self._stop_within:
            return f"not stopped within {self._stop_within:g} s of the signal (LoopConfig.stop_within)"
        for name, began in ((self._phase, self._phase_began), ("step", self._step_began)):
            limit = self._deadlines.get(name)
            if limit is not None and began and now - self._asleep - began > limit:
                return f"step {self._step}: {name} took longer than {limit:g} s (LoopConfig.deadlines)"
        return ""

    def look(self, now: float, computed: float) -> str:
        """`overdue`, after a gap since the last look was judged. now: time.monotonic(). computed: time.process_time()."""
        gap = now - self._looked
        if gap > ASLEEP_AFTER and computed - self._computed < BUSY * gap:
            self._asleep += gap
        self._looked, self._computed = now, computed
        return self.overdue(now)

    def _watch(self) -> None:
        while not self._closed.wait(LOOK_EVERY):
            if told := self.look(time.monotonic(), time.process_time()):
                say_at_once(f"\nstopped: {told}; {self._write_stacks(told)}")
                os._exit(HUNG)

    def _write_stacks(self, told: str) -> str:
        """Where the stacks are, in words; a full disk does not keep the process from ending."""
        file = self._directory / "stacks.txt"
        try:
            with file.open("a") as stacks:
                stacks.write(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {told}; phase {self._phase}\n")
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

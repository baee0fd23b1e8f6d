"""A deadline for every phase of a step: what hangs ends in a stack trace of every thread and an exit code of its own."""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

HUNG = 4
"""Exit code of a run that a deadline ended."""
LOOK_EVERY = 0.25


class Watchdog:
    """A thread that ends the process with HUNG once a deadline has passed, after writing DIRECTORY/stacks.txt.

    Nothing is saved then: the main thread hangs, and the newest checkpoint is whole. A context manager.
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

    def enter(self, phase: str, step: int, *, first: bool = False) -> None:
        """``phase`` of ``step`` begins now; first: so does the step. phase '': nothing is watched any more."""
        self._phase, self._phase_began = phase, time.monotonic()
        if first or not phase:
            self._step, self._step_began = step, self._phase_began if phase else 0.0

    def overdue(self, now: float) -> str:
        """What has passed its deadline, in words; '' while nothing has."""
        since = self._stopping_since()
        if since and now - since > self._stop_within:
            return f"not stopped within {self._stop_within:g} s of the signal (LoopConfig.stop_within)"
        for name, began in ((self._phase, self._phase_began), ("step", self._step_began)):
            limit = self._deadlines.get(name)
            if limit is not None and began and now - began > limit:
                return f"step {self._step}: {name} took longer than {limit:g} s (LoopConfig.deadlines)"
        return ""

    def _watch(self) -> None:
        while not self._closed.wait(LOOK_EVERY):
            if told := self.overdue(time.monotonic()):
                file = self._directory / "stacks.txt"
                with file.open("a") as stacks:
                    stacks.write(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {told}; phase {self._phase}\n")
                    stacks.flush()
                    faulthandler.dump_traceback(stacks, all_threads=True)
                os.write(2, f"\nstopped: {told}; the stacks of all threads are in {file}\n".encode())
                os._exit(HUNG)

    def __enter__(self) -> Watchdog:
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()

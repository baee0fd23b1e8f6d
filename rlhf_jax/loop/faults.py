"""Faults on purpose, at named points of a run: how the tests, and you, see what a run survives.

    run.loop = @LoopConfig()
    LoopConfig.faults = [@Fault()]
    Fault.point = 'update'
    Fault.action = 'kill'
    Fault.step = 3

Each fault happens once in a process. A resumed run may drop them: keys of LoopConfig may change.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rlhf_jax.errors import InputError

PHASES = ("log", "evaluate", "save", "end")
"""Parts of every step, by name, besides those of the algorithm; end is after the last step."""
SAVING = ("write", "hash", "commit", "retain")
"""Inside a save: before Orbax writes; (in the background) before hashing, before the step gets its name, and after."""
ACTIONS = ("kill", "raise", "hang", "slow", "nan", "disk_full", "corrupt")


@dataclass(frozen=True)
class Fault:
    """point: a phase of the algorithm ("train", "rollout", ...), one of PHASES or SAVING;
    a run refuses others when it opens. step: when, None: the first time. seconds: how long 'slow' takes.

    action: kill (SIGKILL to this process), raise, hang (for ever), slow, disk_full (ENOSPC), nan (point 'log' only: the
    first metric of the step arrives as NaN), corrupt (point 'commit' or 'retain' only: one bit of the largest file of
    the step flips; at 'commit' after it was hashed).
    """

    point: str
    action: Literal["kill", "raise", "hang", "slow", "nan", "disk_full", "corrupt"]
    step: int | None = None
    seconds: float = 1.0

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            raise InputError(f"Fault.action = {self.action!r}: one of {', '.join(ACTIONS)}")
        only = {"nan": ("log",), "corrupt": ("commit", "retain")}.get(self.action)
        if only and self.point not in only:
            raise InputError(f"Fault.point = {self.point!r}: action {self.action!r} works at {' and '.join(only)} only")


class Faults:
    """What is still to happen in this process."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        self._waiting = list(faults)

    def at(self, point: str, step: int, place: Path | None = None) -> bool:
        """Do what is due at ``point`` of ``step``. place: a checkpoint being written. True: the caller must make a NaN."""
        nan = False
        for fault in [f for f in self._waiting if f.point == point and f.step in (None, step)]:
            self._waiting.remove(fault)
            nan = nan or fault.action == "nan"
            _do(fault, step, place)
        return nan


def _do(fault: Fault, step: int, place: Path | None) -> None:
    if fault.action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault.action == "raise":
        raise RuntimeError(f"injected fault at {fault.point!r} of step {step}")
    elif fault.action == "disk_full":
        raise OSError(errno.ENOSPC, f"injected: {os.strerror(errno.ENOSPC)}", str(place or fault.point))
    elif fault.action in ("hang", "slow"):
        time.sleep(fault.seconds if fault.action == "slow" else 1e9)
    elif fault.action == "corrupt" and place is not None:
        flip_bit(max((path for path in place.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size))


def flip_bit(file: Path) -> None:
    """One bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)

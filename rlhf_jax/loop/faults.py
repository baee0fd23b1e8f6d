"""Fault injection at named points of a run, for tests of what a run survives.

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
"""Phases of every step besides those of the algorithm; end is after the last step."""
SAVING = ("write", "hash", "commit", "retain")
"""Points of a save: before Orbax writes; in the background before hashing, before the rename to the step number, and after."""
ACTIONS = ("kill", "raise", "hang", "slow", "nan", "disk_full", "corrupt")


@dataclass(frozen=True)
class Fault:
    """A fault to inject.

    point: a phase of the algorithm ("train", "rollout", ...), or one of PHASES or SAVING; checked when the run opens.
    action: kill (SIGKILL to this process), raise, hang (for ever), slow, disk_full (ENOSPC), nan (point 'log' only: the
        first metric of the step becomes NaN), corrupt (point 'commit' or 'retain' only: flips one bit of the largest file
        of the step; at 'commit' after it was hashed).
    step: the step of the fault; None: the first time.
    seconds: the duration of 'slow'.
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
    """The faults that are still to be injected in this process."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        self._pending = list(faults)

    def at(self, point: str, step: int, place: Path | None = None) -> bool:
        """Apply the faults of ``point`` and ``step``; return whether the caller must set a metric to NaN.

        place: the checkpoint that is being written.
        """
        nan = False
        for fault in [f for f in self._pending if f.point == point and f.step in (None, step)]:
            self._pending.remove(fault)
            nan = nan or fault.action == "nan"
            _inject(fault, step, place)
        return nan


def _inject(fault: Fault, step: int, place: Path | None) -> None:
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
    """Flip one bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)

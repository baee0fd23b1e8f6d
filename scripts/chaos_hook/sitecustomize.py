"""Kills the process at the n-th rename or fsync: Python loads this module first in processes that scripts/chaos.py starts.

CHAOS_COUNT: a file that gets one line for each call. CHAOS_KILL_AT: 'rename 7 before' or 'fsync 3 after'; SIGKILL there.
"""

from __future__ import annotations

import os
import signal
from typing import Any

_count = os.environ.get("CHAOS_COUNT")
_kill_at = os.environ.pop("CHAOS_KILL_AT", "").split()
_calls = {"rename": 0, "fsync": 0}


def _watched(kind: str, call: Any) -> Any:
    def watch(*arguments: Any, **names: Any) -> Any:
        _calls[kind] += 1
        due = _kill_at[:2] == [kind, str(_calls[kind])]
        if _count:
            with open(_count, "a") as file:
                file.write(f"{kind}\n")
        if due and _kill_at[2] == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        answer = call(*arguments, **names)
        if due:
            os.kill(os.getpid(), signal.SIGKILL)
        return answer

    return watch


if _count or _kill_at:
    for _name, _kind in (("rename", "rename"), ("replace", "rename"), ("fsync", "fsync"), ("fdatasync", "fsync")):
        setattr(os, _name, _watched(_kind, getattr(os, _name)))
